"""A step without a finite gradient: which module broke it, which samples, and that looking changes nothing."""

import math
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

from tests.tiny import Made, records, tiny_run
from vlm import checkpoint
from vlm.data.batch import Batch
from vlm.train import run as run_module
from vlm.train.diagnose import explain
from vlm.train.log import Log, read_metrics
from vlm.train.loop import Plan, fit
from vlm.train.run import train_run

CAPTIONS = ("red", "a green square", "a blue square", "yellow")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tiny_run(tmp_path, "decoder"))


def explained(made: Made, *batches: Batch) -> str:
    made.step(list(batches), 1.0)
    return explain(made.passes, batches, [0] * len(batches))


def with_nan(batch: Batch, row: int) -> Batch:
    images = batch.pixels.clone()
    images[row, 0, 3, 5] = math.nan
    return replace(batch, images=images)


def test_a_broken_picture_is_named(made: Made) -> None:
    good = made.batch(*CAPTIONS)
    assert explained(made, good, with_nan(good, 2)) == "the pixels are not finite, samples 2"


@pytest.mark.parametrize(
    "name", ["vision.backbone.model.blocks.0.mlp.fc1", "connector.layers.0", "language.stack.blocks.0.ffn.down"]
)
def test_a_broken_layer_is_named(made: Made, name: str) -> None:
    layer = made.model.get_submodule(name)
    with torch.no_grad():
        layer.weight[0, 0] = math.inf
    found = explained(made, made.batch(*CAPTIONS))
    assert found.startswith(f"{name} (whose own weights are not) is the first module whose output is not finite")


def test_an_overflow_names_the_rows_it_comes_from(made: Made) -> None:
    def overflow(module: object, given: object, output: torch.Tensor) -> torch.Tensor:
        return output * torch.tensor([1.0, math.inf, 1.0, math.inf])[:, None, None]

    made.model.connector.register_forward_hook(overflow)
    found = explained(made, made.batch(*CAPTIONS))
    assert found == "connector is the first module whose output is not finite, samples 1, 3"


def test_a_gradient_that_breaks_alone(made: Made) -> None:
    name, weight = next((n, p) for n, p in made.model.named_parameters() if n.startswith("connector"))
    weight.register_hook(lambda gradient: gradient * math.nan)
    found = explained(made, made.batch(*CAPTIONS))
    assert found == f"the losses are finite, but the gradient of {name} is not, samples 0, 1, 2, 3"


def test_looking_leaves_no_trace(made: Made) -> None:
    batch = with_nan(made.batch(*CAPTIONS), 0)
    state = {name: tensor.clone() for name, tensor in made.task.state_dict().items()}
    random = torch.get_rng_state()
    explain(made.passes, [batch], [3])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], tensor) for name, tensor in made.task.state_dict().items())
    assert not any(module._forward_hooks for module in made.model.modules())


def test_a_bad_step_is_said_counted_and_passed(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made.batch(*CAPTIONS)
    bad = with_nan(good, 1)
    with Log(tmp_path, 8, "train", 1, {}) as log:
        batches = chain([good, bad, bad, good, bad], repeat(good))
        fit(made.passes, batches, made.optimizer, Plan(8, max_bad_steps=3), log, lambda *given: None)
    assert [r["train/bad_steps"] for r in read_metrics(tmp_path)] == [0, 1, 2, 2, 3, 3, 3, 3]
    said = " ".join(capsys.readouterr().err.split())
    for step, count in ((2, 1), (5, 3)):
        assert (
            f"warning: step {step} has no finite gradient and is skipped ({count} so far): "
            "the pixels are not finite, samples 1" in said
        )
    assert said.count("no finite gradient") == 2  # once for each streak


def test_the_checkpoint_before_too_many_bad_steps_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted across a restart too: a run that is started again and again does not go on for ever."""
    run = tiny_run(tmp_path, "decoder", "train.steps=12", "train.save_every=2", "train.max_bad_steps=3")
    original = run_module.begun

    def spoiled(batches):  # type: ignore[no-untyped-def]
        return (with_nan(batch.to("cpu"), 0) for batch in original(batches))  # floats from there on

    train_run(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "begun", spoiled)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"in the last 3 steps \(up to 3\): the pixels are not finite"):
                train_run(run, tmp_path / "run", resume="auto")
    newest = checkpoint.latest(tmp_path / "run")
    assert newest.name == "step-0000002" and checkpoint.damage(newest) == ""
    assert checkpoint.read_state(newest)["progress"]["bad_in_a_row"] == 2
    assert [r["train/bad_steps"] for r in records(tmp_path / "run")] == [1, 2]
