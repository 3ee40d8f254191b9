"""How sure a figure is: bootstrap intervals over pictures, and a paired comparison of two models on the same queries.

Captions of one picture are right or wrong together, so what is drawn is a group: a picture with all of its queries
(cluster bootstrap, percentiles: Efron & Tibshirani 1993, chapter 13). A recall is the mean of `rank <= k`.

Letters: n queries (m of the second model, n where they are the same), G groups, d draws that are worked on at once.
"""

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

    `bounds`: what a value can be at least and at most. Where all values stand at one bound the bootstrap has nothing to
    vary, and would be sure; the exact binomial interval over groups takes its place (Clopper & Pearson 1934).
    ValueError: no values, values that are not finite, not one group each.
    """
    data = _Groups(groups)
    column = data.column(values, "values")
    at = [bound for bound in bounds or () if (column == bound).all()]
    if bounds and at:
        # All of G groups are right with probability q^G: the q at which that is 2.5 %.
        share = 1 - ((1 - LEVEL) / 2) ** (1 / data.count)
        low, high = bounds
        return (low, low + share * (high - low)) if at[0] == low else (high - share * (high - low), high)
    of = data.statistic([column], statistic)
    return _middle(np.concatenate([of([weights]) for weights in data.resampled(seed, draws, len(column))]))


def compare(
    first: Shaped[Tensor, "n"],
    second: Shaped[Tensor, "m"],
    groups: Sequence[str],
    seed: int = 0,
    statistic: Statistic = "mean",
    *,
    second_groups: Sequence[str] | None = None,
    draws: int = DRAWS,
) -> Comparison:
    """How two models differ on the same queries. The interval is by bootstrap, p by exchanging the models.

    p: how often a difference as large, either way, comes out if for each group it is left to chance which model gave
    which values (a permutation test; at least 1 / (1 + draws)). Identical models: difference 0, p 1.
    `second_groups`: of the second model's queries, where they come from elsewhere. ValueError: other queries in another
    number or order; as of `interval`.
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


def _middle(found: Float[np.ndarray, "d"]) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
