"""Tables between published weight names and ours: one row serves both directions, and nothing may be left over."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Names = str | tuple[str, ...]


@runtime_checkable
class Conversion(Protocol):
    """How the published tensors of a row become ours, and back."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """`count` tensors of ours."""
        ...

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """`count` published tensors."""
        ...


class Stacked:
    """Stacked along the first axis and cut into equal parts (fused q, k, v); one for one: as it is."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Equal parts."""
        return _cut(theirs, count)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Equal parts."""
        return _cut(ours, count)


def _cut(tensors: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    whole = torch.cat(list(tensors), 0) if len(tensors) > 1 else tensors[0]
    return tuple(part.clone() for part in whole.chunk(count, 0)) if count > 1 else (whole,)


class Transposed:
    """A matrix that is published as the factor on the right (x W)."""

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Transposed."""
        return (theirs[0].T.contiguous(),)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Transposed."""
        return (ours[0].T.contiguous(),)


@dataclass(frozen=True)
class Reshaped:
    """The same numbers in another shape."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """In our shape."""
        return (theirs[0].reshape(self.ours),)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """In the published shape."""
        return (ours[0].reshape(self.theirs),)


SCALAR = Reshaped((), (1,))  # published without a dimension; ours has one
STACKED = Stacked()


@dataclass(frozen=True)
class _Fused:
    """Tensors of single experts as one (E ...), `parts` of them stacked to make an expert's."""

    parts: int

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """One tensor."""
        groups = [theirs[at : at + self.parts] for at in range(0, len(theirs), self.parts)]
        return (torch.stack([torch.cat(list(group), 0) for group in groups]),)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Cloned, because a file may not hold views of one storage."""
        return tuple(part.clone() for expert in ours[0] for part in expert.chunk(self.parts, 0))


class Unit(NamedTuple):
    """The published tensors that have to be read together, and those of ours that they make."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    via: Conversion

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by name."""
        made = self.via.to_ours([theirs[name] for name in self.theirs], len(self.ours))
        return dict(zip(self.ours, made, strict=True))

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors by name."""
        made = self.via.to_theirs([ours[name] for name in self.ours], len(self.theirs))
        return dict(zip(self.theirs, made, strict=True))


@dataclass(frozen=True)
class Row:
    """Published tensors and the tensors of ours that they are; `{i}` in both stands for a block's number."""

    theirs: Names
    ours: Names
    via: Conversion = STACKED

    def reading(self, theirs: Iterable[str]) -> tuple[list[Unit], list[str]]:
        """Units for the published names that are there, and the names that are missing beside some of them."""
        return self._units(_tuple(self.theirs), _tuple(self.ours), theirs, ours_first=False)

    def writing(self, ours: Mapping[str, Tensor]) -> tuple[list[Unit], list[str]]:
        """The same from our tensors."""
        return self._units(_tuple(self.ours), _tuple(self.theirs), ours, ours_first=True)

    def _units(
        self, given: tuple[str, ...], other: tuple[str, ...], names: Iterable[str], ours_first: bool
    ) -> tuple[list[Unit], list[str]]:
        found: dict[str, set[str]] = {}
        for name in names:
            for pattern in given:
                if (match := _match(pattern, name)) is not None:
                    found.setdefault(match.get("i", ""), set()).add(name)
        units, missing = [], list[str]()
        for number, present in found.items():
            wanted = tuple(_fill(pattern, number) for pattern in given)
            missing += [name for name in wanted if name not in present]
            made = tuple(_fill(pattern, number) for pattern in other)
            units.append(Unit(made, wanted, self.via) if ours_first else Unit(wanted, made, self.via))
        return units, missing

    def under(self, theirs: str, ours: str) -> "Row":
        """The same with prefixes."""
        return replace(self, theirs=_prefixed(theirs, self.theirs), ours=_prefixed(ours, self.ours))


@dataclass(frozen=True)
class Experts:
    """Published tensors of single experts, `{e}` their number, and the one tensor of ours (E ...) that holds them all.

    Several of theirs are stacked along the first axis to make an expert's part of ours (gate and up).
    """

    theirs: tuple[str, ...]
    ours: str

    def reading(self, theirs: Iterable[str]) -> tuple[list[Unit], list[str]]:
        """Units for the published names that are there, and the names that are missing beside some of them."""
        present = set(theirs)
        found = [match for name in present for p in self.theirs if (match := _match(p, name)) is not None]
        counts: dict[str, int] = {}
        for match in found:
            number = match.get("i", "")
            counts[number] = max(counts.get(number, 0), int(match["e"]) + 1)
        units = [self._unit(number, count) for number, count in counts.items()]
        return units, [name for unit in units for name in unit.theirs if name not in present]

    def writing(self, ours: Mapping[str, Tensor]) -> tuple[list[Unit], list[str]]:
        """Units for the names of ours that are there."""
        found = [(match, len(value)) for name, value in ours.items() if (match := _match(self.ours, name)) is not None]
        return [self._unit(match.get("i", ""), count) for match, count in found], []

    def under(self, theirs: str, ours: str) -> "Experts":
        """The same with prefixes."""
        return replace(self, theirs=tuple(theirs + name for name in self.theirs), ours=ours + self.ours)

    def _unit(self, number: str, count: int) -> Unit:
        names = [_fill(pattern, number).replace("{e}", str(e)) for e in range(count) for pattern in self.theirs]
        return Unit(tuple(names), (_fill(self.ours, number),), _Fused(len(self.theirs)))


@dataclass(frozen=True)
class Table:
    """All rows of a family.

    `ignored`: patterns of published tensors that carry no weights of their own (position ids, copies of tied ones).
    `spellings`: older or other spellings of published names, as patterns and replacements for the one in the rows.
    """

    family: str
    rows: tuple[Row | Experts, ...]
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    def reading(self, theirs: Iterable[str]) -> list[Unit]:
        """How to make ours of published tensors. ValueError: a name that no row knows, or half of a fused tensor."""
        spelt = {self.spell(name): name for name in theirs}
        names = [name for name in spelt if not any(re.fullmatch(pattern, name) for pattern in self.ignored)]
        units = self._units([row.reading(names) for row in self.rows], "published")
        used = {name for unit in units for name in unit.theirs}
        self._refuse(
            [spelt[name] for name in names if name not in used], "published tensors that our table does not know"
        )
        return [unit._replace(theirs=tuple(spelt[name] for name in unit.theirs)) for unit in units]

    def writing(self, ours: Mapping[str, Tensor]) -> list[Unit]:
        """How to make published tensors of ours. ValueError as in `reading`."""
        units = self._units([row.writing(ours) for row in self.rows], "our")
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
        )

    def _units(self, found: Sequence[tuple[list[Unit], list[str]]], whose: str) -> list[Unit]:
        missing = [name for _, names in found for name in names]
        self._refuse(missing, f"{whose} tensors that are missing beside others")
        return [unit for units, _ in found for unit in units]

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
    )


def linear(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    """Rows of a layer with a weight and perhaps a bias."""
    return [Row(f"{theirs}.{part}", f"{ours}.{part}") for part in (("weight", "bias") if bias else ("weight",))]


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _prefixed(prefix: str, names: Names) -> Names:
    return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)


@lru_cache(maxsize=4096)
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{([ie])\\}", r"(?P<\1>\\d+)", re.escape(pattern)))


def _match(pattern: str, name: str) -> dict[str, str] | None:
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


def _fill(pattern: str, number: str) -> str:
    return pattern.replace("{i}", number)
