"""What one task of `vlm evaluate` found: figures for programs, one value a query for comparisons, parts of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int, Shaped
from torch import Tensor

from vlm.eval.report import Section


@dataclass(frozen=True)
class Outcome:
    """`metrics`, `chance`, `counts` and `protocol` go into metrics.json, under the name of the task.

    `values`: what each query got, such as {"itc/t2i/rank": …}; two models are compared query by query on them. `groups`
    names under the same keys the picture of each query: queries about one picture are drawn together in intervals.
    `queries` names the queries themselves (as the pictures unless given), `samples` says of which sample of the data
    each is, for a page that shows its picture. `intervals`: 95 %, of figures in `metrics`.
    """

    metrics: Mapping[str, Any]
    chance: Mapping[str, Any]
    counts: Mapping[str, Any]
    protocol: Mapping[str, Any]  # what decides the figures: tie rule, k, prompts, normalisation
    values: Mapping[str, Shaped[Tensor, "_"]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sections: Sequence[Section] = ()  # of the report, the first one its table beside chance
    queries: Mapping[str, Sequence[str]] = field(default_factory=dict)
    samples: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
