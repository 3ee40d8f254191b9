"""Tables between published weight names and ours: one row serves both directions, and nothing may be left over."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One published tensor and the tensor of ours it is; `{i}` in both stands for a block's number.

    Several of ours are stacked along the first axis to make the published one (fused q, k, v).
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Our names as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Published to ours."""
        tensor = tensor.T.contiguous() if self.transpose else tensor
        return tuple(tensor.chunk(len(self.names), 0)) if len(self.names) > 1 else (tensor,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours to published."""
        tensor = torch.cat(list(tensors), 0) if len(tensors) > 1 else tensors[0]
        return tensor.T.contiguous() if self.transpose else tensor


@dataclass(frozen=True)
class Table:
    """All rows of a family; `ignored` are patterns of published tensors that carry no weights (position ids)."""

    family: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = field(default=())

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors from published ones. Errors: a published tensor that no row knows."""
        ours: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in theirs.items():
            if any(re.fullmatch(pattern, name) for pattern in self.ignored):
                continue
            found = [(row, match) for row in self.rows if (match := _match(row.theirs, name)) is not None]
            if not found:
                unknown.append(name)
                continue
            row, match = found[0]
            ours |= zip((_fill(own, match) for own in row.names), row.split(tensor), strict=True)
        self._refuse(unknown, "published tensors that our table does not know")
        return ours

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors from ours. Errors: a tensor of ours that no row knows, or half of a fused one."""
        theirs: dict[str, Tensor] = {}
        used: set[str] = set()
        for name in ours:
            for row in self.rows:
                match = _match(row.names[0], name)
                if match is None:
                    continue
                parts = [_fill(own, match) for own in row.names]
                if all(part in ours for part in parts):
                    theirs[_fill(row.theirs, match)] = row.join([ours[part] for part in parts])
                    used.update(parts)
        self._refuse([name for name in ours if name not in used], "tensors of ours that the table does not know")
        return theirs

    def _refuse(self, names: list[str], what: str) -> None:
        if names:
            shown = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
            raise ValueError(f"{self.family}: {what}: {shown}")


def linear(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    """Rows of a layer with a weight and perhaps a bias."""
    return [Row(f"{theirs}.{part}", f"{ours}.{part}") for part in (("weight", "bias") if bias else ("weight",))]


def _match(pattern: str, name: str) -> dict[str, str] | None:
    found = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"), name)
    return None if found is None else found.groupdict()


def _fill(pattern: str, found: Mapping[str, str]) -> str:
    return pattern.replace("{i}", found.get("i", ""))
