"""FLOPs of a step against the rule of thumb, worked out layer by layer: frozen 2, first that learns 4, above it 6."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.tiny import Made, tiny_run
from vlm.data.batch import Batch
from vlm.nn import attention
from vlm.nn.norm import RMSNorm
from vlm.train.flops import flops_per_sample
from vlm.train.log import read_metrics
from vlm.train.run import train_run

CAPTIONS = ("red", "a green square", "a blue square", "yellow")


class ByRule:
    """Counts while a model runs: products by their rows and matrices, attention by its shapes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total = 0
        attend = functional.scaled_dot_product_attention
        monkeypatch.setattr(functional, "linear", self._layer(functional.linear))
        for module in (functional, attention):
            monkeypatch.setattr(module, "scaled_dot_product_attention", self._mix(attend))
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", self._conv(nn.Conv2d._conv_forward))

    def _layer(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
            self._add(x, weight, x.numel() // x.shape[-1])
            return original(x, weight, *rest, **more)

        return call

    def _conv(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = original(layer, x, weight, bias)
            self._add(x, weight, out.numel() // out.shape[1])
            return out

        return call

    def _add(self, x: Tensor, weight: Tensor, rows: int) -> None:
        learns, passes_on = weight.requires_grad, x.requires_grad
        self.total += (2 + 2 * learns + 2 * passes_on) * rows * weight.numel()

    def _mix(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
            once = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            self.total += once * (3 if query.requires_grad else 1)
            return original(query, key, value, *rest, **more)

        return call


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_counted_equals_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connector: str, frozen: bool) -> None:
    """Of models all of whose outputs are used; where some are not, the rule counts backward passes that never run."""
    changes = (f"model.vision.frozen={str(frozen).lower()}", f"model.connector={{kind: {connector}}}")
    made = Made(tiny_run(tmp_path, "decoder", *changes))
    batch = made.batch(*CAPTIONS)
    assert batch.prompts is not None
    counted = flops_per_sample(made.task.train(), batch, torch.float32)
    with monkeypatch.context() as patch:
        rule = ByRule(patch)
        made.task(batch)
    norms = sum(isinstance(module, RMSNorm) for module in made.model.modules())
    gains = norms * 2 * batch.prompts.ids.numel() * made.model.language.dim  # torch sums their gradients by products
    assert counted == pytest.approx((rule.total + gains) / 4, rel=1e-3)


def test_a_frozen_tower_costs_its_forward_pass_alone(tmp_path: Path) -> None:
    counted = []
    for frozen in ("true", "false"):
        made = Made(tiny_run(tmp_path, "decoder", f"model.vision.frozen={frozen}"))
        counted.append(flops_per_sample(made.task.train(), made.batch(*CAPTIONS), torch.float32))
    assert counted[0] < counted[1]


def test_counting_leaves_no_trace(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "qformer", "model.connector.dropout=0.5"))
    batch: Batch = made.batch(*CAPTIONS)

    def step() -> tuple[dict[str, float], float]:
        torch.manual_seed(1)
        made.optimizer.param_groups[0]["lr"] = made.optimizer.param_groups[1]["lr"] = 0.0
        return made.step([batch], 1.0)

    before, random = step(), torch.get_rng_state()
    flops_per_sample(made.task, batch, torch.float32)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in made.task.parameters())
    assert step() == before


def test_the_log_tells_the_health(tmp_path: Path) -> None:
    train_run(tiny_run(tmp_path, "decoder"), tmp_path / "run")
    for record in read_metrics(tmp_path / "run"):
        assert 0 < record["train/mfu"] < 1
        assert 0 <= record["train/data_share"] < 1
        assert record["train/data_seconds"] >= 0 and record["train/compute_seconds"] > 0
        assert record["train/tokens_per_second"] > record["train/samples_per_second"] > 0
        assert record["train/peak_memory_mb"] > 50
        assert record["train/grad_norm"] > 0
