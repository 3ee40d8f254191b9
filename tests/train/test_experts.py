"""Balance by bias while training: loads of a whole step, equal on all processes, and what the log tells."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import Made, tiny_run
from vlm.nn.moe import MixtureOfExperts, Routing, softmax_router
from vlm.train.experts import Health, Report, experts_of
from vlm.world import World

MOE = ["model.language.ffn.kind=moe", "model.language.ffn.experts=4"]


def mixture() -> MixtureOfExperts:
    return MixtureOfExperts(4, 2, softmax_router(4, 4, 1, bias=True))


ALONE = World(torch.device("cpu"))


def routing(*load: float) -> Routing:
    return Routing(torch.zeros(()), torch.tensor(load), torch.tensor(0.5), torch.tensor(float(load[0] == 8)))


def test_one_step_of_the_bias_for_all_passes_of_a_step() -> None:
    health = Health([moe := mixture()], 0.25)
    health.step([[routing(9.0, 0, 0, 0)], [routing(0, 5.0, 0, 4.0)]], ALONE)  # in all 9, 5, 0, 4, so 4.5 would be fair
    assert moe.router.bias is not None
    assert moe.router.bias.tolist() == [-0.25, -0.25, 0.25, 0.25]


def test_the_bias_of_frozen_experts_stays() -> None:
    """Under adapters, say, whose base is frozen: a buffer, so its requires_grad does not tell."""
    health = Health([asleep := mixture().requires_grad_(False), awake := mixture()], 0.25)
    health.step([[routing(9.0, 0, 0, 0), routing(9.0, 0, 0, 0)]], ALONE)
    assert asleep.router.bias is not None and asleep.router.bias.tolist() == [0.0] * 4
    assert awake.router.bias is not None and awake.router.bias.tolist() == [-0.25, 0.25, 0.25, 0.25]


def test_report_and_warning() -> None:
    health = Health([mixture(), mixture()])
    assert health.report() is None
    health.step([[routing(1.0, 1, 1, 1), routing(8.0, 8, 0, 0)]], ALONE)
    report = health.report()
    assert isinstance(report, Report)
    values = report.values()
    assert values["experts/load/0"] == [1.0] * 4 and values["experts/load/1"] == [2.0, 2.0, 0.0, 0.0]
    assert values["experts/dropped"] == 1.0
    assert (values["experts/unused"], values["experts/load_max"], values["experts/entropy"]) == (2.0, 2.0, 0.5)
    assert "2 of 4 in mixture 1" in report.warning() and "mixture 0" not in report.warning()
    assert health.report() is None, "told once"


def test_no_warning_while_most_are_used() -> None:
    assert Report(torch.tensor([[3.0, 0.5, 0.5, 0.0]]), torch.zeros(1), 0.0).warning() == ""


def test_training_moves_the_bias_and_tells_the_loss(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "decoder", *MOE, "model.language.ffn.bias_rate=0.01"))
    mixtures = experts_of(made.model)
    assert len(mixtures) == 1
    health = Health(mixtures, 0.01)
    losses, _ = made.step([made.batch("a red square")], 1.0, health)
    assert losses["balance"] == pytest.approx(0.01, rel=0.2)  # a fresh router is nearly uniform: alpha
    bias = mixtures[0].router.bias
    assert bias is not None and 0 < float(bias.abs().max()) == pytest.approx(0.01)
    assert "language.stack.blocks.0.ffn.router.bias" in made.model.state_dict(), "the bias is in the checkpoint"


PROCESS = """
import json, sys, torch
from torch import distributed
from tests.train.test_experts import mixture, routing
from vlm.train.experts import Health
from vlm.world import World
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
health = Health([moe := mixture()], 0.5)
health.step([[routing(9.0, 0, 0, 0) if rank else routing(0, 0, 0, 27.0)]], World(torch.device("cpu"), rank, 2))
distributed.barrier()
print(json.dumps(moe.router.bias.tolist()))
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    """Each alone would starve other experts: 9, 0, 0, 0 and 0, 0, 0, 27 are together 9, 0, 0, 27, fair is 9."""
    root = Path(__file__).parent.parent.parent
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "meet")],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    biases = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
    assert biases == [[0.0, 0.5, 0.5, -0.5]] * 2


def test_what_is_dropped_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is; were something left out of the plan, the count would tell."""
    moe = MixtureOfExperts(4, 2, softmax_router(4, 4, 2))
    x, valid = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    assert float(moe(x, valid)[1].dropped) == 0
    monkeypatch.setattr("vlm.nn.experts.Plan.load", lambda plan: torch.tensor([3.0, 2.0, 1.0, 1.0]))
    assert float(moe(x, valid)[1].dropped) == 3
