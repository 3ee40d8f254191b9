"""What is told of the values that queries got: means of them, or of what follows from them."""

from collections.abc import Mapping, Sequence

from jaxtyping import Shaped
from torch import Tensor

from vlm.eval.interval import interval

KS = (1, 5, 10)
RANK = "/rank"  # ends the names of ranks, of which lower is better


def measures(name: str, values: Shaped[Tensor, "n"]) -> dict[str, Tensor]:
    """Values whose means are figures: of "itc/t2i/rank" recalls in percent and the mean rank, of others themselves."""
    if not name.endswith(RANK):
        return {name: values.double()}
    stem = name.removesuffix(RANK)
    recalls = {f"{stem}/R@{k}": 100 * (values <= k).double() for k in KS}
    return recalls | {f"{stem}/mean_rank": values.double()}


def intervals(
    values: Mapping[str, Shaped[Tensor, "_"]], groups: Mapping[str, Sequence[str]], seed: int
) -> dict[str, tuple[float, float]]:
    """95 % of the figures that `measures` gives."""
    found = {}
    for name, given in values.items():
        for measure, each in measures(name, given).items():
            bounds = (0.0, 100.0) if "/R@" in measure else None
            found[measure] = interval(each, list(groups[name]), seed=seed, bounds=bounds)
    return found
