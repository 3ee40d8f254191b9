"""Many pieces of different origin as few flat arrays: strings, texts of different length, tensors that lie in files.

Letters: K rows, L elements of all of them, P parts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of different length, one after the other."""

    flat: Shaped[Tensor, "L"]
    ends: Int[Tensor, "K"]  # of the rows, counted from the first element

    @staticmethod
    def of(rows: Iterable[Tensor], dtype: torch.dtype) -> "Rows":
        """Joined rows, which may be none."""
        kept = [row.to("cpu", dtype) for row in rows]
        ends = torch.tensor(list(accumulate(map(len, kept))), dtype=torch.int64)
        return Rows(torch.cat([torch.zeros(0, dtype=dtype), *kept]), ends)

    @staticmethod
    def joined(parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts."""
        starts = accumulate((len(part.flat) for part in parts), initial=0)
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return Rows(torch.cat([part.flat for part in parts]), torch.cat(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> Shaped[Tensor, "l"]:
        start = int(self.ends[row - 1]) if row > 0 else 0
        return self.flat[start : int(self.ends[row])]


class Strings(Sequence[str]):
    """Strings that take no more memory than their bytes."""

    def __init__(self, rows: Rows) -> None:
        """`rows`: UTF-8, uint8."""
        self.rows = rows

    @staticmethod
    def of(strings: Iterable[str]) -> "Strings":
        """Packed strings; half of a surrogate pair, which has no bytes, becomes ?."""
        encoded = [text.encode("utf-8", "replace") for text in strings]
        flat = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        ends = torch.tensor(list(accumulate(map(len, encoded))), dtype=torch.int64)
        return Strings(Rows(flat[: int(ends[-1]) if encoded else 0], ends))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.rows[index % len(self)].numpy().tobytes().decode()


@dataclass(frozen=True)
class Stacked:
    """Tensors of one shape by number, in the parts they were made in: in memory, or mapped from files.

    `chosen`: which of them are counted here; None: all.
    """

    parts: Sequence[Shaped[Tensor, "_ ..."]]
    chosen: Int[Tensor, "K"] | None = None

    @cached_property
    def _ends(self) -> Int[Tensor, "P"]:
        return torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.chosen is None else len(self.chosen)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.take(torch.tensor([row]))[0] for row in range(len(self)))

    def take(self, rows: Int[Tensor, "k"]) -> Shaped[Tensor, "k ..."]:
        """A copy of some, in this order."""
        rows = rows.cpu() if self.chosen is None else self.chosen[rows.cpu()]
        found = torch.searchsorted(self._ends, rows, right=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self._ends[:-1]])
        out = self.parts[0].new_empty(len(rows), *self.parts[0].shape[1:])
        for number in found.unique().tolist():
            here = found == number
            out[here] = self.parts[number][rows[here] - starts[number]]
        return out

    def select(self, rows: Int[Tensor, "k"]) -> "Stacked":
        """Some of them, without a copy."""
        return Stacked(self.parts, rows.cpu() if self.chosen is None else self.chosen[rows.cpu()])
