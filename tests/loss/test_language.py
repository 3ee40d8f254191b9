"""Language-modelling loss: which positions count, and the mean over them by a loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.loss.language import IGNORE, language, supervised


def naive(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """B T V and B T: position t is asked for the label of t + 1."""
    losses = []
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            target = int(labels[row, t + 1])
            if target == IGNORE:
                continue
            chance = logits[row, t] - logits[row, t].exp().sum().log()
            losses.append(-(1 - smoothing) * chance[target] - smoothing * chance.mean())
    return torch.stack(losses).mean()


@given(st.integers(1, 3), st.integers(2, 6), st.floats(0, 0.5), st.integers(0, 99))
def test_equals_a_loop_with_gradients(rows: int, length: int, smoothing: float, seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (rows, length), generator=maker)
    labels[torch.rand(rows, length, generator=maker) < 0.4] = IGNORE
    labels[0, 1] = 3
    logits = torch.randn(rows, length, 5, generator=maker, requires_grad=True)
    found, expected = language(*supervised(logits, labels), smoothing), naive(logits, labels, smoothing)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_positions_predict_the_next_label() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8], [5, 6, IGNORE, IGNORE]])
    states, target = supervised(hidden, labels)
    assert states[:, 0].tolist() == [1.0, 2.0, 4.0]
    assert target.tolist() == [7, 8, 6]


def test_the_first_label_is_never_asked_for() -> None:
    states, target = supervised(torch.randn(1, 3, 2), torch.tensor([[4, IGNORE, IGNORE]]))
    assert len(states) == len(target) == 0


def test_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).log()
    assert float(language(logits, torch.tensor([1, 1]))) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert float(language(torch.zeros(3, 10), torch.tensor([1, 2, 3]))) == pytest.approx(math.log(10))


def test_equals_torch_on_the_shifted_rectangle() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[:, :2] = IGNORE
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(language(*supervised(logits, labels), 0.1), expected)


def test_no_supervised_token_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no supervised token.*max_tokens"):
        language(*supervised(torch.randn(2, 4, 3), torch.full((2, 4), IGNORE)))


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits, target = torch.randn(6, 9).bfloat16(), torch.arange(6)
    assert language(logits, target).dtype == torch.float32
    torch.testing.assert_close(language(logits, target), language(logits.float(), target))
