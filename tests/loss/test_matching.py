"""ITM: which pairs are judged, how hard negatives are drawn, and the loss by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm.loss.matching import chance, hard_pairs, matching


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def owned(owner: list[int], images: int) -> tuple[Tensor, Tensor]:
    index = torch.tensor(owner)
    return index, torch.arange(images)[:, None] == index[None]


@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_pairs_never_contradict_the_positives(images: int, owner: list[int], seed: int) -> None:
    index, positive = owned([image % images for image in owner], images)
    positive = positive | (torch.rand(positive.shape, generator=generator(seed)) < 0.3)
    logits = torch.randn(positive.shape, generator=generator(seed)) * 20
    pairs = hard_pairs(logits, positive, index, generator(seed))
    assert torch.equal(positive[pairs.image, pairs.text], pairs.match.bool())


@given(st.integers(2, 4), st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_layout_is_texts_then_wrong_images_then_wrong_texts(images: int, owner: list[int]) -> None:
    index, positive = owned([image % images for image in owner], images)
    texts, images_left, texts_left = len(owner), ~positive.all(0), ~positive[index].all(1)
    every = torch.arange(texts)
    pairs = hard_pairs(torch.zeros(images, texts), positive, index)
    first, second = texts, texts + int(images_left.sum())
    assert pairs.match.tolist() == [1] * texts + [0] * (len(pairs.match) - texts)
    assert torch.equal(pairs.image[:first], index) and torch.equal(pairs.text[:first], every)
    assert torch.equal(pairs.text[first:second], every[images_left])
    assert torch.equal(pairs.image[second:], index[texts_left])


def test_three_pairs_per_text_in_the_usual_case() -> None:
    owner, positive = owned([0, 1, 2, 3], 4)
    pairs = hard_pairs(torch.randn(4, 4), positive, owner)
    assert len(pairs.image) == len(pairs.text) == len(pairs.match) == 12
    assert int(pairs.match.sum()) == 4


def test_an_image_that_everything_describes_gives_no_negative() -> None:
    owner = torch.tensor([0, 1])
    positive = torch.tensor([[True, True], [False, True]])
    pairs = hard_pairs(torch.zeros(2, 2), positive, owner)
    # Text 0 has the wrong image 1, text 1 none; image 0 has no wrong text, image 1 has text 0.
    assert list(zip(*(part.tolist() for part in pairs), strict=True)) == [(0, 0, 1), (1, 1, 1), (1, 0, 0), (1, 0, 0)]


def test_a_batch_of_one_has_positives_only() -> None:
    pairs = hard_pairs(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0, 0]))
    assert pairs.image.tolist() == [0, 0] and pairs.text.tolist() == [0, 1] and pairs.match.tolist() == [1, 1]


def test_drawn_as_often_as_the_softmax_says() -> None:
    owner, positive = owned([0, 1, 2, 3], 4)
    logits = torch.randn(4, 4, generator=generator(3)) * 1.5
    draws, counts = 3000, torch.zeros(2, 4, 4)
    maker = generator(4)
    for _ in range(draws):
        pairs = hard_pairs(logits, positive, owner, maker)
        counts[0, pairs.text[4:8], pairs.image[4:8]] += 1
        counts[1, pairs.image[8:], pairs.text[8:]] += 1
    for found, scores in zip(counts, (logits.T, logits), strict=True):
        assert float(found.diagonal().sum()) == 0
        expected = draws * scores.masked_fill(positive, -torch.inf).softmax(1)
        off = ~positive
        squares = ((found - expected)[off] ** 2 / expected[off]).sum()
        assert float(squares) < 26.1  # chi-square, 8 degrees of freedom, 0.1 %
    uniform = torch.full_like(logits, draws / 3)
    assert float(((counts[1] - uniform)[~positive] ** 2 / uniform[~positive]).sum()) > 100


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e30])
def test_extreme_logits_still_give_negatives(scale: float) -> None:
    owner, positive = owned([0, 1, 2, 3, 4], 5)
    logits = torch.where(positive, scale, -scale) * torch.rand(5, 5, generator=generator())
    for seed in range(20):
        pairs = hard_pairs(logits, positive, owner, generator(seed))
        assert torch.equal(positive[pairs.image, pairs.text], pairs.match.bool())
        assert len(pairs.match) == 15


def test_positives_have_no_weight_and_every_negative_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[Tensor] = []

    def record(weight: Tensor, _count: int, generator: torch.Generator | None = None) -> Tensor:
        weights.append(weight)
        return weight.argmax(1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", record)
    owner, positive = owned([0, 1, 1], 2)
    hard_pairs(torch.randn(2, 3) * 1000, positive, owner)
    for weight, never in zip(weights, (positive.T, positive[owner]), strict=True):
        assert torch.equal(weight == 0, never)


def test_the_hardest_is_drawn_when_it_stands_out() -> None:
    owner, positive = owned([0, 1, 2], 3)
    logits = torch.tensor([[0.0, 90.0, 0.0], [0.0, 0.0, 90.0], [90.0, 0.0, 0.0]])
    pairs = hard_pairs(logits, positive, owner)
    assert pairs.image[3:6].tolist() == [2, 0, 1]  # for texts 0, 1, 2
    assert pairs.text[6:].tolist() == [1, 2, 0]  # for images 0, 1, 2


def test_drawing_needs_no_gradient_and_keeps_none() -> None:
    owner, positive = owned([0, 1], 2)
    pairs = hard_pairs(torch.randn(2, 2, requires_grad=True), positive, owner)
    assert not any(part.requires_grad for part in pairs)


def test_seeded_draws_repeat() -> None:
    owner, positive = owned([0, 1, 2, 3], 4)
    first, again, other = (hard_pairs(torch.zeros(4, 4), positive, owner, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.image, again.image) and torch.equal(first.text, again.text)
    assert not (torch.equal(first.image, other.image) and torch.equal(first.text, other.text))


def test_chance_is_the_loss_of_knowing_only_the_share() -> None:
    assert chance() == pytest.approx(0.6365, abs=1e-4)
    match = torch.tensor([1, 0, 0])
    logits = torch.tensor([[2 / 3, 1 / 3]]).log().expand(3, 2)
    assert float(matching(logits, match)) == pytest.approx(chance())


def test_loss_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0], [4.0, 1.0]]).log()
    assert float(matching(logits, torch.tensor([1, 0]))) == pytest.approx((math.log(4 / 3) + math.log(5 / 4)) / 2)
    assert matching(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_chance_with_smoothing_is_the_least_loss_of_a_constant_answer(smoothing: float) -> None:
    match = torch.tensor([1, 0, 0])
    bias = torch.linspace(-4, 4, 4001)
    constant = torch.stack([torch.zeros_like(bias), bias], 1)
    losses = torch.stack([matching(row.expand(3, 2), match, smoothing) for row in constant])
    assert float(losses.min()) == pytest.approx(chance(smoothing), abs=1e-5)
