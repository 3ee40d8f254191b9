"""What is told of the values that queries got: means of them, or of what follows from them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from vlm.eval.interval import interval

KS = (1, 5, 10)
RANK = "/rank"  # ends the names of ranks, of which lower is better
PERCENT = ("vqa", "exact", "anls", "choice_sum", "choice_mean")  # last parts of the names of values that are percent


def recalls(counts: Mapping[str, Any]) -> tuple[int, ...]:
    """At which k recalls of ranks are told; `counts`: of their task. Top-5 of four classes says nothing."""
    return tuple(k for k in (1, 5) if k <= counts["classes"]) if "classes" in counts else KS


def measures(name: str, values: Shaped[Tensor, "n"], ks: Sequence[int] = KS) -> dict[str, Tensor]:
    """Values whose means are figures: of "itc/t2i/rank" recalls in percent and the mean rank, of others themselves."""
    if not name.endswith(RANK):
        return {name: values.double()}
    stem = name.removesuffix(RANK)
    found = {f"{stem}/R@{k}": 100 * (values <= k).double() for k in ks}
    return found | {f"{stem}/mean_rank": values.double()}


def bounds(measure: str) -> tuple[float, float] | None:
    """What a value can be at least and at most; None: that is not known."""
    return (0.0, 100.0) if "/R@" in measure or measure.rpartition("/")[2] in PERCENT else None


def intervals(
    values: Mapping[str, Shaped[Tensor, "_"]],
    groups: Mapping[str, Sequence[str]],
    seed: int,
    counts: Mapping[str, Any],
) -> dict[str, tuple[float, float]]:
    """95 % of the figures that `measures` gives."""
    return {
        measure: interval(each, list(groups[name]), seed=seed, bounds=bounds(measure))
        for name, given in values.items()
        for measure, each in measures(name, given, recalls(counts)).items()
    }
