"""The running average of the weights: the formula, the loan to the model, and saving."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlm.train.average import Average


def model() -> nn.Module:
    net = nn.ModuleDict({"frozen": nn.Linear(1, 1), "head": nn.Linear(1, 2)})
    net["frozen"].requires_grad_(False)
    return net


def set_weights(net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in net["head"].parameters():
            parameter.fill_(value)


def test_only_what_learns_is_averaged() -> None:
    assert set(Average(model(), 0.9).tensors) == {"head.weight", "head.bias"}


def test_follows_the_formula() -> None:
    net = model()
    set_weights(net, 0.0)
    average, expected = Average(net, 0.3), 0.0
    for step in range(40):
        set_weights(net, float(step))
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))  # 0.1 at first, so that the start is soon forgotten
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.tensors["head.weight"], torch.full((2, 1), expected))


def test_lent_to_the_model_and_taken_back() -> None:
    net = model()
    set_weights(net, 1.0)
    average = Average(net, 0.5)
    set_weights(net, 3.0)
    frozen = net["frozen"].weight.clone()
    with average.applied():
        assert net["head"].bias.tolist() == [1.0, 1.0]
        assert torch.equal(net["frozen"].weight, frozen)
    assert net["head"].bias.tolist() == [3.0, 3.0]
    with pytest.raises(RuntimeError, match="while lent"), average.applied():
        raise RuntimeError("while lent")
    assert net["head"].bias.tolist() == [3.0, 3.0]
    assert average.tensors["head.bias"].tolist() == [1.0, 1.0]


def test_round_trip(tmp_path: Path) -> None:
    net = model()
    average = Average(net, 0.9)
    save_file(average.tensors, tmp_path / "average.safetensors")
    set_weights(net, 5.0)
    other = Average(net, 0.9)
    other.load(tmp_path / "average.safetensors")
    assert all(torch.equal(other.tensors[name], average.tensors[name]) for name in average.tensors)


def test_an_average_of_other_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "average.safetensors"
    save_file({"head.weight": torch.zeros(2, 1)}, file)
    with pytest.raises(ValueError, match=r"averages other weights than those that learn now: compare train\.params"):
        Average(model(), 0.9).load(file)
