"""Tables between published weight names and ours, of a family and of a system; nothing may be left over."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from vlm.model.weights.rows import Experts, Row, Subtree, Unit


class Sorted(NamedTuple):
    """Published names as a table sees them: what makes ours, what is missing beside others, what no row knows."""

    units: list[Unit]
    missing: list[str]
    unknown: list[str]


@dataclass(frozen=True)
class Table:
    """All rows of a family.

    `ignored`: patterns of published tensors that carry no weights of their own (position ids, copies of tied ones).
    `spellings`: older or other spellings of published names, as patterns and replacements for the one in the rows.
    `also`: rows of another layout of the same tensors, which is read and never written.
    """

    family: str
    rows: tuple[Row | Experts | Subtree, ...]
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    also: tuple[Row | Experts, ...] = ()

    def reading(self, theirs: Iterable[str]) -> list[Unit]:
        """How to make ours of published tensors. ValueError: a name that no row knows, or half of a fused tensor."""
        units, missing, unknown = self.sort(theirs)
        self._refuse(missing, "published tensors that are missing beside others")
        self._refuse(unknown, "published tensors that our table does not know")
        return units

    def sort(self, theirs: Iterable[str]) -> Sorted:
        """What becomes of published tensors, whatever their names."""
        spelt, again = dict[str, str](), list[str]()
        for name in theirs:
            spelling = self.spell(name)
            if any(re.fullmatch(pattern, spelling) for pattern in self.ignored):
                continue
            if spelling in spelt:
                again.append(name)
            spelt.setdefault(spelling, name)
        found = [row.reading(spelt) for row in (*self.rows, *self.also)]
        units = [unit for units, _ in found for unit in units]
        used = {name for unit in units for name in unit.theirs}
        return Sorted(
            [unit._replace(theirs=tuple(spelt.get(name, name) for name in unit.theirs)) for unit in units],
            [name for _, names in found for name in names],
            [name for spelling, name in spelt.items() if spelling not in used] + again,
        )

    def writing(self, ours: Mapping[str, Tensor]) -> list[Unit]:
        """How to make published tensors of ours. ValueError as in `reading`."""
        found = [row.writing(ours) for row in self.rows]
        self._refuse([name for _, names in found for name in names], "our tensors that are missing beside others")
        units = [unit for units, _ in found for unit in units]
        used = {name for unit in units for name in unit.ours}
        self._refuse([name for name in ours if name not in used], "tensors of ours that the table does not know")
        return units

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors from published ones. Errors as of `reading`."""
        return {name: value for unit in self.reading(theirs) for name, value in unit.to_ours(theirs).items()}

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors from ours. Errors as of `writing`."""
        return {name: value for unit in self.writing(ours) for name, value in unit.to_theirs(ours).items()}

    def spell(self, name: str) -> str:
        """A published name as the rows spell it."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def under(self, theirs: str, ours: str) -> "Table":
        """The same family as a part of a system, where its names have prefixes."""
        return Table(
            self.family,
            tuple(row.under(theirs, ours) for row in self.rows),
            tuple(re.escape(theirs) + f"(?:{pattern})" for pattern in self.ignored),
            tuple((rf"^{re.escape(theirs)}{old.removeprefix('^')}", theirs + new) for old, new in self.spellings),
            tuple(row.under(theirs, ours) for row in self.also),
        )

    def renamed(self, pairs: tuple[tuple[str, str], ...]) -> "Table":
        """The same where published names are spelt otherwise: patterns and what stands in their place."""

        def spelt(name: str) -> str:
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            return name

        def row(old: Row | Experts | Subtree) -> Row | Experts | Subtree:
            if isinstance(old, Subtree):
                return replace(old, theirs=spelt(old.theirs))
            if isinstance(old, Experts) or not isinstance(old.theirs, str):
                return replace(old, theirs=tuple(map(spelt, old.theirs)))
            return replace(old, theirs=spelt(old.theirs))

        return replace(self, rows=tuple(map(row, self.rows)), also=())

    def only(self, ours: str) -> "Table":
        """The table of the part whose names of ours begin so; what the files hold of the other parts is passed over."""
        rows = tuple(mine for row in self.rows if (mine := row.within(ours)) is not None)
        also = tuple(mine for row in self.also if (mine := row.within(ours)) is not None)
        others = [row for row in (*self.rows, *self.also) if row.within(ours) is None]
        passed = (pattern for row in others for pattern in row.patterns())
        return replace(self, rows=rows, also=also, ignored=(*self.ignored, *passed))

    def without(self, ours: str) -> "Table":
        """The table of the rest: what the files hold of the part whose names of ours begin so is passed over."""
        rows = tuple(row for row in self.rows if row.within(ours) is None)
        also = tuple(row for row in self.also if row.within(ours) is None)
        left = [row for row in (*self.rows, *self.also) if row.within(ours) is not None]
        passed = (pattern for row in left for pattern in row.patterns())
        return replace(self, rows=rows, also=also, ignored=(*self.ignored, *passed))

    def _refuse(self, names: list[str], what: str) -> None:
        if names:
            shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
            raise ValueError(f"{self.family}: {what}: {shown}")


def system(family: str, *tables: Table, spellings: tuple[tuple[str, str], ...] = ()) -> Table:
    """The tables of a system's parts as one; `spellings` of whole names come before those of the parts."""
    return Table(
        family,
        tuple(row for table in tables for row in table.rows),
        tuple(pattern for table in tables for pattern in table.ignored),
        spellings + tuple(pair for table in tables for pair in table.spellings),
        tuple(row for table in tables for row in table.also),
    )
