"""How sure a figure is: bootstrap intervals over groups of queries, and a paired comparison of two models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

DRAWS = 1000


@dataclass(frozen=True)
class Comparison:
    """Mean of second - first, its 95 % interval, and how often chance alone would give as large a difference."""

    difference: float
    low: float
    high: float
    p: float


def interval(
    values: Shaped[Tensor, "n"], groups: Sequence[str], statistic: Callable[[Tensor], float], seed: int
) -> tuple[float, float]:
    """95 % percentile interval of a statistic; values of one group are drawn together."""
    number = _numbers(groups)
    generator = torch.Generator().manual_seed(seed)
    count = int(number.max()) + 1
    found = []
    for _ in range(DRAWS):
        drawn = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        found.append(statistic(values.repeat_interleave(drawn[number])))
    low, high = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def compare(first: Shaped[Tensor, "n"], second: Shaped[Tensor, "n"], groups: Sequence[str], seed: int) -> Comparison:
    """Of the same queries under two models; p by exchanging the two for whole groups."""
    change = second.double() - first.double()
    low, high = interval(change, groups, lambda drawn: float(drawn.mean()), seed)
    number = _numbers(groups)
    sums = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add_(0, number, change)
    signs = torch.randint(2, (DRAWS, len(sums)), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    extreme = int(((signs @ sums).abs() >= float(change.sum().abs()) - 1e-9).sum())
    return Comparison(float(change.mean()), low, high, (1 + extreme) / (1 + DRAWS))


def _numbers(groups: Sequence[str]) -> Tensor:
    found: dict[str, int] = {}
    return torch.tensor([found.setdefault(name, len(found)) for name in groups])
