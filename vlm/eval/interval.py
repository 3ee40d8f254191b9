"""How sure a figure is: bootstrap intervals over pictures, and a paired comparison of two models on the same queries.

Captions of one picture are right or wrong together, so what is drawn is a group: a picture with all of its queries
(cluster bootstrap, percentiles: Efron & Tibshirani 1993, chapter 13). A recall is the mean of `rank <= k`.

Letters: n queries (m of the second model, n where they are the same), G groups, d draws that are worked on at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Statistic = Literal["mean", "median"]
Of = Callable[[Sequence[Float[np.ndarray, "d G"]]], Float[np.ndarray, "d"]]
LEVEL = 0.95
DRAWS = 2000
FEW = 10  # groups off a bound, from which on the bootstrap knows enough of them
BLOCK = 2**21  # numbers in the largest array of a block of draws


@dataclass(frozen=True)
class Comparison:
    """Second - first: the difference, its 95 % interval, and p of none or as large a one either way by chance."""

    difference: float
    low: float
    high: float
    p: float


def interval(
    values: Shaped[Tensor, "n"],
    groups: Sequence[str],
    statistic: Statistic = "mean",
    seed: int = 0,
    *,
    bounds: tuple[float, float] | None = None,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """The 95 % interval of the mean or median of `values`, which come in `groups`; the order does not matter.

    `bounds`: what a value can be at least and at most. Where fewer than FEW groups are off a bound the bootstrap has
    little to vary and would be too sure: the interval of a mean then also holds the exact binomial one over the groups
    (Clopper & Pearson 1934). ValueError: no values, values that are not finite, not one group each.
    """
    data = _Groups(groups)
    column = data.column(values, "values")
    of = data.statistic([column], statistic)
    found = _middle(np.concatenate([of([weights]) for weights in data.resampled(seed, draws, len(column))]))
    return found if bounds is None or statistic != "mean" else data.widened(found, column, bounds, data.count)


def compare(
    first: Shaped[Tensor, "n"],
    second: Shaped[Tensor, "m"],
    groups: Sequence[str],
    seed: int = 0,
    statistic: Statistic = "mean",
    *,
    second_groups: Sequence[str] | None = None,
    bounds: tuple[float, float] | None = None,
    draws: int = DRAWS,
) -> Comparison:
    """How two models differ on the same queries. The interval is by bootstrap, p by exchanging the models.

    p: how often a difference as large, either way, comes out if for each group it is left to chance which model gave
    which values (a permutation test; at least 1 / (1 + draws)). Identical models: difference 0, p 1.
    `second_groups`: of the second model's queries, where they come from elsewhere. `bounds`: as of `interval`; for
    where most groups differ as much as they can. ValueError: other queries in another number or order, or as there.
    """
    data = _Groups(groups)
    _refuse_others(groups, groups if second_groups is None else second_groups, len(first), len(second))
    one, two = data.column(first, "first"), data.column(second, "second")
    of_one, of_two, of_both = (data.statistic(columns, statistic) for columns in ([one], [two], [one, two]))
    drawn = [of_two([weights]) - of_one([weights]) for weights in data.resampled(seed, draws, len(one))]
    everything = [np.ones((1, data.count))]
    difference = float((of_two(everything) - of_one(everything))[0])
    as_large = 0
    for swapped in data.chosen(seed, draws, 2 * len(one)):
        kept = 1 - swapped
        change = np.abs(of_both([swapped, kept]) - of_both([kept, swapped]))
        as_large += int((change >= abs(difference) * (1 - 1e-9)).sum())
    low, high = _middle(np.concatenate(drawn))
    if bounds is not None and statistic == "mean":
        most = bounds[1] - bounds[0]
        low, high = data.widened((low, high), two - one, (-most, most), data.count // 2)
    return Comparison(difference, low, high, (1 + as_large) / (1 + draws))


class _Groups:
    """Groups by number in the order of their names, so that a draw means the same in any order of the queries."""

    def __init__(self, groups: Sequence[str]) -> None:
        if not len(groups):
            raise ValueError("interval: there are no queries")
        names, self.member = np.unique(np.asarray(groups), return_inverse=True)
        self.count = len(names)

    def column(self, values: Tensor, name: str) -> Float[np.ndarray, "n"]:
        """The values in fp64."""
        column = values.detach().cpu().double().numpy()
        if len(column) != len(self.member):
            raise ValueError(f"interval: {len(column)} {name} for {len(self.member)} queries with a group")
        bad = int((~np.isfinite(column)).sum())
        if bad:
            raise ValueError(f"interval: {bad} of {len(column)} {name} are not finite")
        return column

    def widened(
        self, found: tuple[float, float], column: Float[np.ndarray, "n"], bounds: tuple[float, float], most: int
    ) -> tuple[float, float]:
        """The interval of a mean, with the exact one at a bound that fewer than FEW groups, at most `most`, are off."""
        low, high = found
        span, share = bounds[1] - bounds[0], (column.mean() - bounds[0]) / (bounds[1] - bounds[0])
        for bound, off in ((bounds[0], share), (bounds[1], 1 - share)):
            if len(np.unique(self.member[column != bound])) <= min(FEW - 1, most):
                ends = [bounds[0] + span * abs(end - (bound == bounds[1])) for end in _binomial(off, self.count)]
                low, high = min(low, *ends), max(high, *ends)
        return low, high

    def statistic(self, columns: Sequence[Float[np.ndarray, "n"]], statistic: Statistic) -> Of:
        """Of all columns together, where every group of every column counts as often as its weight says."""
        return (self._mean if statistic == "mean" else self._median)(columns)

    def _mean(self, columns: Sequence[Float[np.ndarray, "n"]]) -> Of:
        sums = np.concatenate([np.bincount(self.member, column, self.count) for column in columns])
        sizes = np.tile(np.bincount(self.member, minlength=self.count), len(columns)).astype(np.float64)

        def mean(weights: Sequence[Float[np.ndarray, "d G"]]) -> Float[np.ndarray, "d"]:
            heavy = np.concatenate(weights, axis=1)
            return np.asarray((heavy @ sums) / (heavy @ sizes))

        return mean

    def _median(self, columns: Sequence[Float[np.ndarray, "n"]]) -> Of:
        together = np.concatenate(columns)
        order = together.argsort(kind="stable")
        ordered = together[order]
        owner = np.concatenate([self.member + i * self.count for i in range(len(columns))])[order]

        def median(weights: Sequence[Float[np.ndarray, "d G"]]) -> Float[np.ndarray, "d"]:
            upto = np.concatenate(weights, axis=1)[:, owner].cumsum(1)
            total = upto[:, -1:]
            middle = [ordered[(upto > place).argmax(1)] for place in ((total - 1) // 2, total // 2)]
            return np.asarray((middle[0] + middle[1]) / 2)

        return median

    def resampled(self, seed: int, draws: int, queries: int) -> Iterator[Float[np.ndarray, "d G"]]:
        """How often each group is drawn when as many as there are are drawn with replacement."""
        for index in self._random(seed, draws, queries, self.count):
            flat = index + np.arange(len(index))[:, None] * self.count
            yield np.bincount(flat.ravel(), minlength=flat.size).reshape(flat.shape).astype(np.float64)

    def chosen(self, seed: int, draws: int, queries: int) -> Iterator[Float[np.ndarray, "d G"]]:
        """Each group taken (1) or not (0), by the toss of a coin."""
        return (coin.astype(np.float64) for coin in self._random(seed, draws, queries, 2))

    def _random(self, seed: int, draws: int, queries: int, below: int) -> Iterator[Int[np.ndarray, "d G"]]:
        if draws < 1:
            raise ValueError(f"interval: draws={draws}: must be at least 1")
        generator = np.random.default_rng(seed)
        most = max(1, BLOCK // max(queries, self.count))
        for start in range(0, draws, most):
            yield generator.integers(below, size=(min(most, draws - start), self.count))


def _refuse_others(first: Sequence[str], second: Sequence[str], ones: int, twos: int) -> None:
    """Compared are answers to the same queries."""
    remedy = "evaluate both models on the same data"
    if len(first) != len(second) or ones != twos:
        raise ValueError(f"compare: {ones} queries in the first and {twos} in the second; {remedy}")
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        if one != two:
            raise ValueError(f"compare: query {number + 1} is of {one!r} in the first, {two!r} in the second; {remedy}")


def _binomial(share: float, tries: int) -> tuple[float, float]:
    """Clopper and Pearson's limits of a share, of few of the tries; a count that is not whole has those around it."""

    def upto(count: int, chance: float) -> float:
        ways = (math.comb(tries, i) * chance**i * (1 - chance) ** (tries - i) for i in range(count + 1))
        return min(1.0, sum(ways))

    tail, least, most = (1 - LEVEL) / 2, math.floor(share * tries + 1e-9), math.ceil(share * tries - 1e-9)
    low = 0.0 if least == 0 else _where(lambda chance: 1 - upto(least - 1, chance) >= tail)
    high = 1.0 if most == tries else _where(lambda chance: upto(most, chance) <= tail)
    return low, high


def _where(reached: Callable[[float], bool]) -> float:
    """The chance from which on it is."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _middle(found: Float[np.ndarray, "d"]) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
