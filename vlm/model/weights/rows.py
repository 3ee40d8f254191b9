"""Rows of tables: published names beside ours, `{i}` standing for a block's number; each serves both directions."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from vlm.model.weights.conversion import STACKED, Conversion, Fused

Names = str | tuple[str, ...]


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

    def within(self, ours: str) -> "Row | None":
        """The same without a prefix of ours; None for what is not under it."""
        names = _tuple(self.ours)
        if not all(name.startswith(ours) for name in names):
            return None
        stripped = tuple(name.removeprefix(ours) for name in names)
        return replace(self, ours=stripped[0] if isinstance(self.ours, str) else stripped)

    def patterns(self) -> list[str]:
        """Regular expressions of the published names."""
        return [_expression(name).pattern for name in _tuple(self.theirs)]


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

    def within(self, ours: str) -> "Experts | None":
        """The same without a prefix of ours; None for what is not under it."""
        return replace(self, ours=self.ours.removeprefix(ours)) if self.ours.startswith(ours) else None

    def patterns(self) -> list[str]:
        """Regular expressions of the published names."""
        return [_expression(name).pattern for name in self.theirs]

    def _unit(self, number: str, count: int) -> Unit:
        names = [_fill(pattern, number).replace("{e}", str(e)) for e in range(count) for pattern in self.theirs]
        return Unit(tuple(names), (_fill(self.ours, number),), Fused(len(self.theirs)))


@dataclass(frozen=True)
class Subtree:
    """Everything under a prefix, by the same names on both sides: a module of the original library that runs here.

    `but`: patterns of names below the prefix that other rows know. What such a module lacks, loading it will say.
    """

    theirs: str
    ours: str
    but: tuple[str, ...] = ()

    def reading(self, theirs: Iterable[str]) -> tuple[list[Unit], list[str]]:
        """Units for the published names that are there; none can be missing beside another."""
        names = self._below(self.theirs, theirs)
        return [Unit((self.theirs + name,), (self.ours + name,), STACKED) for name in names], []

    def writing(self, ours: Mapping[str, Tensor]) -> tuple[list[Unit], list[str]]:
        """Units for the names of ours that are there."""
        names = self._below(self.ours, ours)
        return [Unit((self.theirs + name,), (self.ours + name,), STACKED) for name in names], []

    def under(self, theirs: str, ours: str) -> "Subtree":
        """The same with prefixes."""
        return replace(self, theirs=theirs + self.theirs, ours=ours + self.ours)

    def within(self, ours: str) -> "Subtree | None":
        """The same without a prefix of ours; None for what is not under it."""
        return replace(self, ours=self.ours.removeprefix(ours)) if self.ours.startswith(ours) else None

    def patterns(self) -> list[str]:
        """Regular expressions of the published names."""
        other = "|".join(self.but)
        return [re.escape(self.theirs) + (f"(?!(?:{other})$).*" if other else ".*")]

    def _below(self, prefix: str, names: Iterable[str]) -> list[str]:
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return [name for name in below if not any(re.fullmatch(pattern, name) for pattern in self.but)]


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
