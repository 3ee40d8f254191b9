"""ITC: by hand, against loops, against torch's own cross-entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm.loss.contrastive import chance, contrastive, inverse_temperature, similarity


@st.composite
def owners(draw: st.DrawFn) -> list[list[int]]:
    """For each image the texts that describe it: its own (one to three), and perhaps some of others."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    texts = sum(counts)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    more = draw(st.lists(st.sets(st.integers(0, texts - 1)), min_size=len(counts), max_size=len(counts)))
    own = [set(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
    return [sorted(a | b) for a, b in zip(own, more, strict=True)]


def as_mask(texts_of: list[list[int]]) -> Tensor:
    positive = torch.zeros(len(texts_of), 1 + max(max(row) for row in texts_of), dtype=torch.bool)
    for row, texts in enumerate(texts_of):
        positive[row, texts] = True
    return positive


def naive_direction(rows: list[list[float]], positive: list[list[bool]], smoothing: float) -> float:
    total = 0.0
    for row, right in zip(rows, positive, strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        for value, hit in zip(row, right, strict=True):
            target = (1 - smoothing) * hit / sum(right) + smoothing / len(row)
            total -= target * (value - normaliser)
    return total / len(rows)


def naive(logits: Tensor, positive: Tensor, smoothing: float) -> float:
    there = naive_direction(logits.tolist(), positive.tolist(), smoothing)
    back = naive_direction(logits.T.tolist(), positive.T.tolist(), smoothing)
    return (there + back) / 2


def test_two_by_two_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()  # every softmax is (3/4, 1/4)
    positive = torch.eye(2, dtype=torch.bool)
    assert float(contrastive(logits, positive)) == pytest.approx(math.log(4 / 3))
    mean = (math.log(4 / 3) + math.log(4)) / 2
    assert float(contrastive(logits, positive, 0.1)) == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * mean)
    assert float(contrastive(logits, ~positive)) == pytest.approx(math.log(4))


def test_one_image_with_two_captions_by_hand() -> None:
    logits = torch.tensor([[2.0, 2.0, 1.0], [1.0, 1.0, 2.0]]).log()
    positive = torch.tensor([[True, True, False], [False, False, True]])
    there = (math.log(5 / 2) + math.log(4 / 2)) / 2  # shares 2/5, 2/5 of the target; 2/4
    back = math.log(3 / 2)  # every column is (2/3, 1/3)
    assert float(contrastive(logits, positive)) == pytest.approx((there + back) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_positive_is_cross_entropy_both_ways(smoothing: float) -> None:
    logits, target = torch.randn(6, 6) * 3, torch.arange(6)
    there = cross_entropy(logits, target, label_smoothing=smoothing)
    back = cross_entropy(logits.T, target, label_smoothing=smoothing)
    torch.testing.assert_close(contrastive(logits, torch.eye(6, dtype=torch.bool), smoothing), (there + back) / 2)


@given(owners(), st.floats(0, 0.5), st.integers(0, 99))
def test_equals_loops_for_any_number_of_captions(texts_of: list[list[int]], smoothing: float, seed: int) -> None:
    positive = as_mask(texts_of)
    logits = torch.randn(positive.shape, generator=torch.Generator().manual_seed(seed)) * 2
    assert float(contrastive(logits, positive, smoothing)) == pytest.approx(
        naive(logits, positive, smoothing), rel=1e-4
    )


@given(owners())
def test_captions_of_one_image_are_never_negatives(texts_of: list[list[int]]) -> None:
    """Where all positives are far above the rest nothing is left to gain: the loss has its floor and no gradient."""
    positive = as_mask(texts_of)
    logits = torch.where(positive, 40.0, -40.0).requires_grad_()
    loss = contrastive(logits, positive)
    floor = (positive.sum(1).log().mean() + positive.sum(0).log().mean()) / 2
    assert float(loss.detach()) == pytest.approx(float(floor), abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


@given(owners(), st.randoms(use_true_random=False))
def test_order_does_not_matter(texts_of: list[list[int]], shuffle: object) -> None:
    positive = as_mask(texts_of)
    logits = torch.randn(positive.shape)
    rows, columns = list(range(positive.shape[0])), list(range(positive.shape[1]))
    shuffle.shuffle(rows)  # type: ignore[attr-defined]
    shuffle.shuffle(columns)  # type: ignore[attr-defined]
    torch.testing.assert_close(
        contrastive(logits[rows][:, columns], positive[rows][:, columns]), contrastive(logits, positive)
    )


def test_gradient() -> None:
    positive = as_mask([[0, 1], [2], [1, 3, 4]])
    logits = torch.randn(3, 5, requires_grad=True)
    contrastive(logits, positive, 0.1).backward()
    assert logits.grad is not None
    step = 1e-3
    for row in range(3):
        for column in range(5):
            nudge = torch.zeros(3, 5)
            nudge[row, column] = step
            up, down = (naive(logits.detach() + sign * nudge, positive, 0.1) for sign in (1, -1))
            assert float(logits.grad[row, column]) == pytest.approx((up - down) / (2 * step), abs=2e-4)


def test_similarity_takes_the_query_that_answers_best() -> None:
    image = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, -3.0]]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert similarity(image, text).tolist() == [[1.0, 2.0, 2.0], [0.0, 0.0, -1.0]]


def test_similarity_equals_loops() -> None:
    image, text = torch.randn(3, 4, 5), torch.randn(6, 5)
    found = similarity(image, text)
    for b in range(3):
        for m in range(6):
            torch.testing.assert_close(found[b, m], max(image[b, q] @ text[m] for q in range(4)))


@pytest.mark.parametrize(("images", "texts"), [(4, 4), (3, 7)])
def test_chance_is_the_loss_of_equal_logits(images: int, texts: int) -> None:
    positive = torch.zeros(images, texts, dtype=torch.bool)
    positive[torch.arange(texts) % images, torch.arange(texts)] = True
    assert float(contrastive(torch.zeros(images, texts), positive)) == pytest.approx(chance(images, texts))


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(8, 8).bfloat16()
    positive = torch.eye(8, dtype=torch.bool)
    found = contrastive(logits, positive)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, contrastive(logits.float(), positive))


def test_temperature_stops_at_a_hundred() -> None:
    assert float(inverse_temperature(torch.tensor([math.log(1 / 0.07)]))) == pytest.approx(1 / 0.07)
    assert float(inverse_temperature(torch.tensor([9.0]))) == pytest.approx(100.0)
