"""How published tensors become ours, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


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
class Fused:
    """Tensors of single experts as one (E ...), `parts` of them stacked to make an expert's."""

    parts: int

    def to_ours(self, theirs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """One tensor."""
        groups = [theirs[at : at + self.parts] for at in range(0, len(theirs), self.parts)]
        return (torch.stack([torch.cat(list(group), 0) for group in groups]),)

    def to_theirs(self, ours: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Cloned, because a file may not hold views of one storage."""
        return tuple(part.clone() for expert in ours[0] for part in expert.chunk(self.parts, 0))
