"""Which family published weights are of, by their names alone."""

from collections.abc import Iterable, Mapping

from vlm.model.weights.table import Table


def known(names: Iterable[str], table: Table) -> int:
    """How many of these published names a table knows, those it ignores among them."""
    every = list(names)
    return len(every) - len(table.sort(every).unknown)


def unknown_family(names: Iterable[str], families: Mapping[str, Table], source: str) -> str:
    """The message for weights that fit none of the families: which tensors were seen, and the nearest family."""
    every = sorted(names)
    seen = ", ".join(every[:4]) + (f", … ({len(every)} in all)" if len(every) > 4 else "")
    counts = {family: known(every, table) for family, table in families.items()}
    nearest = max(counts, key=lambda family: counts[family], default=None)
    near = f"the nearest is {nearest}, which knows {counts[nearest]} of them" if nearest and counts[nearest] else ""
    return (
        f"{source}: is of no family that vlm knows ({', '.join(families)}); its tensors: {seen}; "
        f"{near or 'no family knows any of them'}"
    )
