"""Ranks against hand-worked matrices and brute force; what must not change them; what must be refused."""

import math
from collections.abc import Callable
from random import Random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from vlm.eval.retrieval import Ranks, chance, rank_counts, rerank, summarize

Set = tuple[Tensor, Tensor, Tensor, Tensor]


def from_scores(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Features whose scores are exactly the given images x texts matrix."""
    scores = torch.tensor(rows)
    return scores[:, None], torch.eye(scores.shape[1])


def one_rank(scores: list[float], positive: list[bool]) -> int:
    best = max(s for s, p in zip(scores, positive, strict=True) if p)
    return 1 + sum(s >= best and not p for s, p in zip(scores, positive, strict=True))


def brute(data: Set) -> tuple[list[int], list[int]]:
    image, text, image_ids, text_ids = data
    scores = torch.einsum("nqe,me->nqm", image.double(), text.double()).amax(1)
    same = image_ids[:, None] == text_ids[None]
    t2i = [one_rank(scores[:, m].tolist(), same[:, m].tolist()) for m in range(len(text_ids))]
    i2t = [one_rank(scores[n].tolist(), same[n].tolist()) for n in range(len(image_ids))]
    return t2i, i2t


def lists(ranks: Ranks) -> tuple[list[int], list[int]]:
    return ranks.t2i.tolist(), ranks.i2t.tolist()


@st.composite
def data_sets(draw: st.DrawFn, ties: bool = True) -> Set:
    """Few small integers (many exact ties) or normal numbers; every id has images and texts, in any order."""
    concepts, queries = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.arange(concepts) * 7 - 3

    def some(extra: int) -> Tensor:
        more = ids[torch.randint(concepts, (extra,), generator=generator)]
        both = torch.cat([ids, more])
        return both[torch.randperm(len(both), generator=generator)]

    image_ids, text_ids = some(draw(st.integers(0, 5))), some(draw(st.integers(0, 9)))
    sizes = (len(image_ids), queries, 3), (len(text_ids), 3)
    if ties:
        image, text = (torch.randint(-1, 2, size, generator=generator).float() for size in sizes)
    else:
        image, text = (torch.randn(size, generator=generator) for size in sizes)
    return image, text, image_ids, text_ids


def test_hand_worked() -> None:
    image, text = from_scores([[0.9, 0.1, 0.5], [0.2, 0.3, 0.5], [0.8, 0.4, 0.6]])
    ids = torch.arange(3)
    # Texts (columns): 0.9 leads; 0.3 behind 0.4; 0.6 leads. Images (rows): leads; 0.3 behind 0.5; 0.6 behind 0.8.
    assert lists(rank_counts(image, text, ids, ids)) == ([1, 2, 1], [1, 2, 2])


def test_hand_worked_several_captions_and_images() -> None:
    image, text = from_scores([[0.1, 0.9, 0.8, 0.7], [0.3, 0.2, 0.1, 0.6], [0.5, 0.4, 0.3, 0.2]])
    ranks = rank_counts(image, text, torch.tensor([4, 9, 4]), torch.tensor([4, 4, 9, 9]))
    # Image 0 has texts 0 and 1: best 0.9. Image 1 has texts 2 and 3: best 0.6. Image 2: best 0.5.
    assert ranks.i2t.tolist() == [1, 1, 1]
    # Text 0: images 0 and 2, best 0.5, above 0.3. Text 2: image 1, 0.1, behind 0.8 and 0.3. Text 3: 0.6 behind 0.7.
    assert ranks.t2i.tolist() == [1, 1, 3, 2]


def test_a_tie_counts_against_the_model() -> None:
    image, text = from_scores([[0.5, 0.5], [0.5, 0.2]])
    ranks = rank_counts(image, text, torch.arange(2), torch.arange(2))
    assert lists(ranks) == ([2, 2], [2, 2])


@pytest.mark.parametrize("width", [3, 64, 512])
@pytest.mark.parametrize("constant", [0.0, 0.37])
def test_a_collapsed_model_gets_the_worst_rank(width: int, constant: float) -> None:
    vector = constant * torch.randn(width, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(37)
    ranks = rank_counts(vector.expand(37, 2, width), vector.expand(37, width), ids, ids, chunk=8)
    assert set(ranks.t2i.tolist()) == set(ranks.i2t.tolist()) == {37}


def test_max_over_queries() -> None:
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.9, 0.0], [0.0, 0.0]]])
    ranks = rank_counts(image, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.arange(2), torch.arange(2))
    # The mean over queries would put image 1 behind for text 0 too; the second query of image 0 finds it.
    assert lists(ranks) == ([1, 2], [2, 1])


def test_a_perfect_model_with_five_captions_has_100_percent() -> None:
    image = torch.nn.functional.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    text_ids = torch.arange(40).repeat_interleave(5)
    result = summarize(rank_counts(image[:, None], image[text_ids], torch.arange(40), text_ids))
    assert result["t2i"]["R@1"] == result["i2t"]["R@1"] == 100
    assert result["rsum"] == 600


# Rules of other tools that flatter or punish, beside ours on the same data.


def test_counting_higher_scores_takes_nan_for_perfect() -> None:
    """A rank of 1 + (scores above the positive's): NaN is above nothing, so features of NaN have R@1 of 100 %."""
    scores = torch.full((6, 6), math.nan)
    assert (1 + (scores > scores.diag()[:, None]).sum(1)).tolist() == [1] * 6
    with pytest.raises(ValueError, match="6 of 6 image vectors are not finite"):
        rank_counts(scores[:, None], torch.eye(6), torch.arange(6), torch.arange(6))


def test_sorting_takes_ties_for_hits() -> None:
    """The k first of equal scores are whatever the sort leaves there: a collapsed model finds k of N by its order."""
    scores, ids = torch.zeros(20, 20), torch.arange(20)
    hits = (scores.topk(5, dim=1).indices == ids[:, None]).any(1)
    assert hits.double().mean() >= 0.25 - 1e-9
    assert summarize(rank_counts(scores[:, None], torch.eye(20), ids, ids))["i2t"]["R@5"] == 0


def test_pairing_punishes_five_captions() -> None:
    """One caption counted as the answer, the image's four others as wrong: a perfect model has R@1 of 20 %."""
    image = torch.nn.functional.normalize(torch.randn(30, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    owner = torch.arange(30).repeat_interleave(5)
    scores = image[owner] @ image[owner].T  # each caption with its image, as a data set of pairs has them
    first = scores.argmax(1) == torch.arange(150)
    assert first.double().mean() <= 0.25
    assert set(rank_counts(image[:, None], image[owner], torch.arange(30), owner).i2t.tolist()) == {1}


@given(data_sets(), st.integers(1, 7))
def test_equals_brute_force_with_ties(data: Set, chunk: int) -> None:
    assert lists(rank_counts(*data, chunk=chunk)) == brute(data)


@given(data_sets(ties=False), st.integers(1, 40))
def test_equals_brute_force_without_ties(data: Set, chunk: int) -> None:
    assert lists(rank_counts(*data, chunk=chunk)) == brute(data)


@given(data_sets(), st.randoms())
def test_permuting_a_gallery_permutes_the_ranks(data: Set, random: Random) -> None:
    image, text, image_ids, text_ids = data
    rows = torch.tensor(random.sample(range(len(image)), len(image)))
    columns = torch.tensor(random.sample(range(len(text)), len(text)))
    before, after = rank_counts(*data), rank_counts(image[rows], text[columns], image_ids[rows], text_ids[columns])
    assert after.i2t.tolist() == before.i2t[rows].tolist()
    assert after.t2i.tolist() == before.t2i[columns].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_widened(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = (
        torch.randn(9, 1, 16, generator=generator).to(dtype),
        torch.randn(9, 16, generator=generator).to(dtype),
    )
    data = image, text, torch.arange(9), torch.arange(9)
    assert lists(rank_counts(*data)) == brute(data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_not_finite_are_refused(value: float, side: str) -> None:
    features = {"image": torch.ones(4, 2, 3), "text": torch.ones(4, 3)}
    features[side][1, ..., 2] = value
    with pytest.raises(ValueError, match=rf"of \d {side} vectors are not finite"):
        rank_counts(features["image"], features["text"], torch.arange(4), torch.arange(4))


def test_features_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="normalise"):
        rank_counts(torch.full((2, 1, 2), 1e19), torch.full((2, 2), 1e19), torch.arange(2), torch.arange(2))


def test_one_vector_far_longer_than_all_others_is_refused() -> None:
    """Its rounding is larger than what lies between any two scores of the others."""
    image, text = torch.eye(5)[:, None].clone(), torch.eye(5)
    image[2] *= 1e6
    with pytest.raises(ValueError, match="the longest image vector is 1000000 times as long as half of them"):
        rank_counts(image, text, torch.arange(5), torch.arange(5))


def test_a_query_without_a_positive_is_refused() -> None:
    image, text = from_scores([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"1 of 2 texts have no image with their id \(first: 8\)"):
        rank_counts(image, text, torch.tensor([0, 0]), torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"1 of 2 images have no text with their id \(first: 8\)"):
        chance(torch.tensor([0, 8]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="no text to rank"):
        rank_counts(image[:0], text[:0], torch.arange(0), torch.arange(0))


def test_summary_by_hand() -> None:
    result = summarize(Ranks(t2i=torch.tensor([1, 3, 7, 2]), i2t=torch.tensor([12])), ks=(1, 2, 10))
    assert result["t2i"] == {"R@1": 25, "R@2": 50, "R@10": 100, "mean_rank": 3.25, "median_rank": 2.5}
    assert result["i2t"] == {"R@1": 0, "R@2": 0, "R@10": 0, "mean_rank": 12, "median_rank": 12}
    assert result["rsum"] == 25 + 50 + 100


def test_chance_of_single_positives_by_hand() -> None:
    result = chance(torch.arange(503), torch.arange(503))
    expected = {"R@1": 100 / 503, "R@5": 500 / 503, "R@10": 1000 / 503, "mean_rank": 252, "median_rank": 252}
    assert result["t2i"] == pytest.approx(expected) and result["i2t"] == pytest.approx(expected)
    assert result["rsum"] == pytest.approx(3200 / 503)
    assert chance(torch.arange(4), torch.arange(4))["t2i"]["median_rank"] == 2.5
    assert chance(torch.arange(4), torch.arange(4))["t2i"]["R@10"] == pytest.approx(100)


def test_chance_of_mixed_positives_equals_a_random_model() -> None:
    """Also the whole path: random features are such a model."""
    image_ids = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4])
    text_ids = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 4])
    generator = torch.Generator().manual_seed(0)
    rounds = []
    for _ in range(600):
        scores = torch.rand(8, 11, generator=generator)
        rounds.append(rank_counts(scores[:, None], torch.eye(11), image_ids, text_ids))
    seen = summarize(Ranks(t2i=torch.cat([r.t2i for r in rounds]), i2t=torch.cat([r.i2t for r in rounds])))
    expected = chance(image_ids, text_ids)
    for way in ("t2i", "i2t"):
        assert seen[way] == pytest.approx(expected[way], rel=0.06)
    assert seen["rsum"] == pytest.approx(expected["rsum"], rel=0.03)


def table_match(table: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda image, text: table[image, text]


def brute_rerank(data: Set, table: Tensor, k: int) -> tuple[list[int], list[int]]:
    """Sort by ITC, sort the first k again by match, walk down to the first positive."""
    image, text, image_ids, text_ids = data
    scores = torch.einsum("nqe,me->nqm", image.double(), text.double()).amax(1)

    def first(itc: list[float], itm: list[float], positive: list[bool]) -> int:
        order = sorted(range(len(itc)), key=lambda at: -itc[at])
        order = sorted(order[:k], key=lambda at: (-itm[at], positive[at])) + order[k:]
        return 1 + [positive[at] for at in order].index(True)

    same = image_ids[:, None] == text_ids[None]
    columns = zip(scores.T.tolist(), table.T.tolist(), same.T.tolist(), strict=True)
    rows = zip(scores.tolist(), table.tolist(), same.tolist(), strict=True)
    return [first(*column) for column in columns], [first(*row) for row in rows]


@given(data_sets(ties=False), st.integers(1, 12), st.integers(1, 9), st.booleans())
def test_rerank_equals_brute_force(data: Set, k: int, chunk: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    table = torch.randn(len(data[0]), len(data[1]), generator=generator)
    table = table.sign() if coarse else table
    assert lists(rerank(*data, table_match(table), k, chunk=chunk, pairs=5)) == brute_rerank(data, table, k)


@given(data_sets(), st.integers(1, 12))
def test_a_match_head_that_says_nothing_earns_nothing(data: Set, k: int) -> None:
    """Constant scores are ties: the shortlist's positives fall behind its negatives, never in front."""
    before = rank_counts(*data)
    after = rerank(*data, lambda image, text: torch.zeros(len(image)), k)
    assert (after.t2i >= before.t2i).all() and (after.i2t >= before.i2t).all()


def test_a_perfect_match_head_lifts_what_the_shortlist_holds() -> None:
    image, text = from_scores([[0.9, 0.8, 0.7], [0.8, 0.7, 0.6], [0.7, 0.6, 0.5]])
    ids = torch.arange(3)
    ranks = rerank(image, text, ids, ids, lambda i, t: (i == t).float(), k=2)
    # The shortlists are images (0, 1) and texts (0, 1) for everybody: the third positive is never in them.
    assert lists(ranks) == ([1, 1, 3], [1, 1, 3])


def test_each_pair_is_asked_once_image_by_image() -> None:
    image, text, ids = torch.randn(6, 1, 4), torch.randn(6, 4), torch.arange(6)
    asked: list[tuple[int, int]] = []

    def match(image_index: Tensor, text_index: Tensor) -> Tensor:
        assert len(image_index) <= 7
        asked.extend(zip(image_index.tolist(), text_index.tolist(), strict=True))
        return torch.zeros(len(image_index))

    rerank(image, text, ids, ids, match, k=3, pairs=7)
    assert asked == sorted(set(asked)) and len(asked) <= 2 * 6 * 3


def test_bad_rerank_input_is_refused() -> None:
    data = torch.eye(3)[:, None], torch.eye(3), torch.arange(3), torch.arange(3)
    with pytest.raises(ValueError, match="k=0"):
        rerank(*data, lambda i, t: torch.zeros(len(i)), k=0)
    with pytest.raises(ValueError, match=r"\d of 7 match scores are not finite"):
        rerank(*data, lambda i, t: torch.where(i == 1, math.nan, 0.0), k=2)
    with pytest.raises(ValueError, match="expected one a pair"):
        rerank(*data, lambda i, t: torch.zeros(len(i), 2), k=2)
    for chunk in (0, 2**16 + 1):
        with pytest.raises(ValueError, match=rf"chunk={chunk}: must be 1 to 65536"):
            rank_counts(*data, chunk=chunk)
