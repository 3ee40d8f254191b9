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
    scalar: bool = False  # published without a dimension; ours has one

    @property
    def names(self) -> tuple[str, ...]:
        """Our names as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Published to ours."""
        tensor = tensor.T.contiguous() if self.transpose else tensor.reshape(1) if self.scalar else tensor
        return tuple(tensor.chunk(len(self.names), 0)) if len(self.names) > 1 else (tensor,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours to published."""
        tensor = torch.cat(list(tensors), 0) if len(tensors) > 1 else tensors[0]
        return tensor.T.contiguous() if self.transpose else tensor.reshape(()) if self.scalar else tensor


@dataclass(frozen=True)
class Experts:
    """Published tensors of single experts, `{e}` their number, and the one tensor of ours (E ...) that holds them all.

    Several of theirs are stacked along the first axis to make an expert's part of ours (gate and up).
    """

    theirs: tuple[str, ...]
    ours: str

    def gather(self, theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """Our tensors, and the published names they are made of. Errors: a part of an expert is missing."""
        found: dict[str, dict[tuple[int, int], Tensor]] = {}
        used: set[str] = set()
        for name, tensor in theirs.items():
            for part, pattern in enumerate(self.theirs):
                if (match := _match(pattern, name)) is not None:
                    found.setdefault(_fill(self.ours, match), {})[int(match["e"]), part] = tensor
                    used.add(name)
        return {own: self._stack(own, parts) for own, parts in found.items()}, used

    def scatter(self, ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """Published tensors, and the names of ours they are made of."""
        theirs: dict[str, Tensor] = {}
        used = set()
        for name, tensor in ours.items():
            if (match := _match(self.ours, name)) is not None:
                used.add(name)
                for e, expert in enumerate(tensor):
                    # Cloned, because a file may not hold views of one storage.
                    parts = (part.clone() for part in expert.chunk(len(self.theirs), 0))
                    theirs |= zip((_fill(their, {**match, "e": str(e)}) for their in self.theirs), parts, strict=True)
        return theirs, used

    def _stack(self, own: str, parts: Mapping[tuple[int, int], Tensor]) -> Tensor:
        experts, kinds = 1 + max(e for e, _ in parts), range(len(self.theirs))
        missing = [(e, part) for e in range(experts) for part in kinds if (e, part) not in parts]
        if missing:
            names = [self.theirs[part].replace("{e}", str(e)) for e, part in missing[:8]]
            raise ValueError(f"{own}: {len(missing)} published tensors of its experts are missing: {', '.join(names)}")
        return torch.stack([torch.cat([parts[e, part] for part in kinds], 0) for e in range(experts)])


@dataclass(frozen=True)
class Table:
    """All rows of a family; `ignored` are patterns of published tensors that carry no weights (position ids)."""

    family: str
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = field(default=())
    experts: tuple[Experts, ...] = field(default=())

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors from published ones. Errors: a published tensor that no row knows, or half of a fused one."""
        ours: dict[str, Tensor] = {}
        used: set[str] = set()
        for experts in self.experts:
            made, parts = experts.gather(theirs)
            ours, used = ours | made, used | parts
        unknown = []
        for name, tensor in theirs.items():
            if name in used or any(re.fullmatch(pattern, name) for pattern in self.ignored):
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
        for experts in self.experts:
            made, parts_used = experts.scatter(ours)
            theirs, used = theirs | made, used | parts_used
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
    expression = re.sub(r"\\{([ie])\\}", r"(?P<\1>\\d+)", re.escape(pattern))
    found = re.fullmatch(expression, name)
    return None if found is None else found.groupdict()


def _fill(pattern: str, found: Mapping[str, str]) -> str:
    return pattern.replace("{i}", found.get("i", "")).replace("{e}", found.get("e", ""))
