"""Intervals hold what they promise, do not depend on order or blocks, and equal plain loops; comparisons of models."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from vlm.eval import interval as module
from vlm.eval.interval import Statistic, compare, interval

FEW = {"draws": 200}


def data(seed: int, pictures: int = 30, captions: int = 5, share: float = 0.6) -> tuple[Tensor, list[str]]:
    """Hits of captions; those of one picture tend to agree."""
    generator = torch.Generator().manual_seed(seed)
    easy = torch.rand(pictures, generator=generator).repeat_interleave(captions)
    noise = torch.rand(len(easy), generator=generator)
    groups = [f"picture {i:03d}" for i in range(pictures) for _ in range(captions)]
    return (0.7 * easy + 0.3 * noise < share).double(), groups


def plain(values: Tensor, groups: list[str], statistic: str, seed: int, draws: int) -> tuple[float, float]:
    """The definition: draw pictures, pool their values, take the statistic."""
    names = sorted(set(groups))
    of = {name: [v for v, group in zip(values.tolist(), groups, strict=True) if group == name] for name in names}
    take = {"mean": np.mean, "median": np.median}[statistic]
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    found = [take([value for i in row for value in of[names[i]]]) for row in drawn]
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


@pytest.mark.parametrize("statistic", ["mean", "median"])
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), min_size=1, max_size=20), st.integers(0, 9))
@settings(max_examples=25)
def test_equals_the_definition(statistic: Statistic, queries: list[tuple[int, int]], seed: int) -> None:
    groups, values = [f"g{group}" for group, _ in queries], torch.tensor([value for _, value in queries])
    found = interval(values, groups, statistic, seed, draws=40)
    assert found == pytest.approx(plain(values, groups, statistic, seed, 40), abs=1e-12)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_the_order_of_the_queries_does_not_matter(statistic: Statistic) -> None:
    hits, groups = data(0)
    other = 100 * data(1)[0]
    order = torch.randperm(len(hits)).tolist()
    moved = [groups[i] for i in order]
    assert interval(hits, groups, statistic) == interval(hits[order], moved, statistic)
    before, after = compare(hits, other, groups), compare(hits[order], other[order], moved)
    assert before == after


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_blocks_only_bound_the_memory(statistic: Statistic, monkeypatch: pytest.MonkeyPatch) -> None:
    one, groups = data(0)
    two = data(1)[0]
    whole = interval(one, groups, statistic, **FEW), compare(one, two, groups, statistic=statistic, **FEW)
    monkeypatch.setattr(module, "BLOCK", 1)  # one draw at a time
    single = interval(one, groups, statistic, **FEW), compare(one, two, groups, statistic=statistic, **FEW)
    assert single[0] == pytest.approx(whole[0], abs=1e-12)
    assert vars(single[1]) == pytest.approx(vars(whole[1]), abs=1e-12)


def test_the_seed_decides() -> None:
    hits, groups = data(0, pictures=41)
    assert interval(hits, groups, seed=3) == interval(hits, groups, seed=3) != interval(hits, groups, seed=4)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """400 data sets of 80 pictures; binomial noise of the coverage itself is 1.1 points."""
    truth = float(data(12345, pictures=200_000)[0].mean())
    wide = narrow = 0
    for seed in range(400):
        hits, groups = data(seed, pictures=80)
        low, high = interval(hits, groups, **FEW)
        wide += low <= truth <= high
        low, high = interval(hits, [str(i) for i in range(len(hits))], **FEW)
        narrow += low <= truth <= high
    assert 0.90 <= wide / 400 <= 0.98
    # Captions taken as independent: far too sure. This is what the groups are for.
    assert narrow / 400 < 0.80


@pytest.mark.parametrize(
    ("wrong", "of", "expected"),
    [(4, 4, (0, 60.236)), (0, 4, (39.764, 100)), (1, 20, (75.127, 100)), (0, 20, (83.157, 100)), (1, 1, (0, 97.5))],
)
def test_few_off_a_bound_are_not_certain(wrong: int, of: int, expected: tuple[float, float]) -> None:
    """Clopper-Pearson (any table); two queries a picture."""
    values = 100.0 * (torch.arange(2 * of) >= 2 * wrong)
    found = interval(values, [f"{i // 2}" for i in range(2 * of)], bounds=(0.0, 100.0))
    assert found == pytest.approx(expected, abs=1e-3)


def test_worse_does_not_look_surer() -> None:
    """But for a tenth of a point where the bootstrap takes over."""
    for of in (20, 1000):
        lows = []
        for wrong in range(13):
            values = 100.0 * (torch.arange(of) >= wrong)
            lows.append(interval(values, [f"{i:04d}" for i in range(of)], bounds=(0.0, 100.0))[0])
        assert all(after < before + 0.15 for before, after in itertools.pairwise(lows))


def test_a_single_picture_says_nothing() -> None:
    assert interval(100.0 * (torch.arange(4) < 2), ["one"] * 4, bounds=(0.0, 100.0)) == (0, 100)


def test_it_covers_the_truth_near_a_bound_too() -> None:
    """600 sets of 60 pictures, of which 97 % are easy."""
    covered = 0
    for seed in range(600):
        right = 100.0 * (torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.97)
        low, high = interval(right, [str(i) for i in range(60)], bounds=(0.0, 100.0), **FEW)
        covered += low <= 97 <= high
    assert covered / 600 >= 0.94


def test_bounds_change_nothing_inside() -> None:
    hits, groups = data(0)
    assert interval(hits, groups, bounds=(0.0, 1.0)) == interval(hits, groups)
    one, two = data(0)[0], data(1)[0]
    assert compare(one, two, groups, bounds=(0.0, 1.0)) == compare(one, two, groups)


def test_as_different_as_can_be_is_not_certain() -> None:
    found = compare(torch.zeros(5), torch.full((5,), 100.0), list("abcde"), bounds=(0.0, 100.0))
    assert (found.difference, found.high) == (100, 100) and found.low == pytest.approx(-100 + 200 * 0.47818, abs=1e-2)
    same = compare(torch.ones(5), torch.ones(5), list("abcde"), bounds=(0.0, 1.0))
    assert (same.low, same.high) == (0, 0)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_identical_models(statistic: Statistic) -> None:
    values, groups = torch.randn(60).exp(), [f"{i % 13}" for i in range(60)]
    found = compare(values, values.clone(), groups, statistic=statistic)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_swapping_the_models_turns_the_sign() -> None:
    (one, groups), two = data(0), data(1)[0]
    there, back = compare(one, two, groups), compare(two, one, groups)
    assert (back.difference, back.p) == (-there.difference, there.p)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_the_same_model_seen_twice_is_rarely_different() -> None:
    """p below 5 % in about 5 of 100 comparisons of equals; a model that is better by 15 points is found."""
    false = sum(compare(*equals(seed), **FEW).p < 0.05 for seed in range(200))
    assert 2 <= false <= 20
    one, two, groups = equals(0)
    better = torch.maximum(two, (torch.rand(len(two)) < 0.3).double())
    found = compare(one, better, groups)
    assert found.low > 0 and found.p < 0.01


def equals(seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Two models of the same skill, pictures of one difficulty."""
    generator = torch.Generator().manual_seed(seed)
    easy = torch.rand(60, generator=generator).repeat_interleave(5)
    one, two = ((torch.rand(300, generator=generator) < easy).double() for _ in range(2))
    return one, two, [str(i // 5) for i in range(300)]


def test_p_equals_all_exchanges() -> None:
    """Of 4 pictures, all 16 exchanges by hand: differences 3, 1, 1 and 2 captions."""
    groups = ["a", "a", "a", "b", "c", "d", "d"]
    one, two = torch.zeros(7), torch.tensor([1.0, 1, 1, 1, -1, 1, 1])
    # Of ±3 ±1 ±1 ±2 in absolute value at least 5: 7 twice, 5 four times; 6 of 16.
    found = compare(one, two, groups, draws=20_000)
    assert found.difference == pytest.approx(5 / 7) and found.p == pytest.approx(6 / 16, abs=0.015)


def test_other_queries_are_refused() -> None:
    one, groups = torch.ones(3), ["a", "a", "b"]
    with pytest.raises(ValueError, match=r"compare: 3 queries in the first and 2 in the second; evaluate both models"):
        compare(one, torch.ones(2), groups)
    with pytest.raises(ValueError, match=r"query 2 is of 'a' in the first, 'b' in the second; evaluate both models"):
        compare(one, one, groups, second_groups=["a", "b", "b"])


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no queries"):
        interval(torch.ones(0), [])
    with pytest.raises(ValueError, match="2 values for 1 queries with a group"):
        interval(torch.ones(2), ["a"])
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        interval(torch.tensor([1, math.nan]), ["a", "b"])
    with pytest.raises(ValueError, match="draws=0"):
        interval(torch.ones(2), ["a", "b"], draws=0)
