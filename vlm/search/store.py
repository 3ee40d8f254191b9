"""Vectors on disk: parts that are written whole or not at all, joined as they become many, read a piece at a time.

Letters: R pictures (rows), Q vectors of each, E their width.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from vlm.search.manifest import Manifest, Part

NAME, SUFFIX = "vectors", ".safetensors"
PART_BYTES = 2**26  # of the largest part
PIECE_BYTES = 2**21  # read at a time: it and its fp32 form stay in the cache of a core
WASTE = 4  # cleared up when every so-manieth vector is of no file
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_CODES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Form:
    """What a picture has on the disk."""

    vectors: int
    dim: int
    dtype: str  # of DTYPES

    @property
    def bytes(self) -> int:
        """Of a picture."""
        return self.vectors * self.dim * DTYPES[self.dtype].itemsize


class Store:
    """The parts of one index, as its manifest lists them."""

    def __init__(self, folder: Path, manifest: Manifest, form: Form) -> None:
        self.folder, self.manifest, self.form = folder, manifest, form

    def rows(self) -> int:
        """Pictures that have a place, those without a file included."""
        return sum(part.rows for part in self.manifest.parts())

    def append(self, new: Float[Tensor, "R Q E"]) -> tuple[Part, list[Part]]:
        """Writes a part, which counts only when the manifest has it; returns it and those that it takes the place of.

        What stands before it is written again with it while that is not much larger: so parts stay few, and each vector
        is written some log2 of all times.
        """
        instead, size = list[Part](), len(new)
        for part in reversed(self.manifest.parts()):
            if part.rows >= 2 * size or (part.rows + size) * self.form.bytes > PART_BYTES:
                break
            instead.insert(0, part)
            size += part.rows
        held = [rows.clone() for rows in self.read(instead)]
        start = instead[0].start if instead else self.rows()
        return self._write(torch.cat([*held, new.to("cpu", DTYPES[self.form.dtype])]), start), instead

    def read(self, parts: Sequence[Part], piece: int = PIECE_BYTES) -> Iterator[Tensor]:
        """Their rows in order, R Q E as stored, about `piece` bytes at a time in the same memory: keep no view of it.

        Reading is a little faster than mapping the file, and its pages do not count as this process's memory.
        ValueError: a part that is missing or damaged.
        """
        most = max(1, min(piece // self.form.bytes, max((part.rows for part in parts), default=1)))
        room = torch.empty(most, self.form.vectors, self.form.dim, dtype=DTYPES[self.form.dtype])
        memory = _bytes(room)
        for part in parts:
            with self._open(part) as file:
                for first in range(0, part.rows, most):
                    rows = min(most, part.rows - first)
                    _fill(file, memory[: rows * self.form.bytes])
                    yield room[:rows]

    def pick(self, places: Int[Tensor, "C"]) -> Tensor:
        """Single rows, C Q E as stored; the places ascend."""
        found = list[Tensor]()
        for part in self.manifest.parts():
            mine = between(places, part.start, part.start + part.rows).tolist()
            if not mine:
                continue
            with self._open(part) as file:
                begin = file.tell()
                for row in mine:
                    room = torch.empty(1, self.form.vectors, self.form.dim, dtype=DTYPES[self.form.dtype])
                    file.seek(begin + row * self.form.bytes)
                    _fill(file, _bytes(room))
                    found.append(room)
        return torch.cat(found) if found else torch.empty(0, self.form.vectors, self.form.dim)

    def clear_up(self, force: bool = False) -> bool:
        """Writes all parts anew without the vectors that no file has, if these are many; returns whether it did."""
        unused, total = self.manifest.unused(), self.rows()
        if not unused or (not force and len(unused) * WASTE < total):
            return False
        old, new, held, size = self.manifest.parts(), list[Part](), list[Tensor](), 0
        most = max(1, PART_BYTES // self.form.bytes)
        start = 0
        for kept in self._used(old, unused):
            held.append(kept)
            size += len(kept)
            if size >= most:
                new.append(self._write(torch.cat(held), start))
                start, held, size = start + size, [], 0
        if size:
            new.append(self._write(torch.cat(held), start))
        self.manifest.drop_unused(new)
        self.remove(old)
        return True

    def _used(self, parts: Sequence[Part], unused: Sequence[int]) -> Iterator[Tensor]:
        dead, first = torch.tensor(unused), 0
        for piece in self.read(parts):
            keep = torch.ones(len(piece), dtype=torch.bool)
            keep[between(dead, first, first + len(piece))] = False
            first += len(piece)
            yield piece[keep]

    def remove(self, parts: Iterable[Part]) -> None:
        """Deletes files that the manifest does not list any more."""
        for part in parts:
            with suppress(FileNotFoundError):
                (self.folder / part.name).unlink()

    def remove_strays(self) -> None:
        """Deletes what a process that was killed has left."""
        known = {part.name for part in self.manifest.parts()}
        for file in [*self.folder.glob(f"{NAME}-*{SUFFIX}"), *self.folder.glob(".*.tmp")]:
            if file.name not in known:
                file.unlink()

    def _write(self, rows: Float[Tensor, "R Q E"], start: int) -> Part:
        """Under a name that no part has had, so that who reads the old ones is not disturbed."""
        number = 1 + max(
            (int(file.stem.rpartition("-")[2]) for file in self.folder.glob(f"{NAME}-*{SUFFIX}")), default=0
        )
        name = f"{NAME}-{number:08d}{SUFFIX}"
        draft = self.folder / f".{name}.tmp"
        try:
            draft.write_bytes(save({NAME: rows.contiguous()}))
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise OSError(f"{self.folder}: could not write vectors: {error}; what was indexed before is kept") from None
        _sync(draft)
        draft.replace(self.folder / name)
        _sync(self.folder)
        return Part(name, start, len(rows))

    def _open(self, part: Part) -> BinaryIO:
        """The file, at its first row."""
        path = self.folder / part.name
        want = {"dtype": _CODES[self.form.dtype], "shape": [part.rows, self.form.vectors, self.form.dim]}
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing: {_MEND}") from None
        try:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 2**16)))
            whole = path.stat().st_size == 8 + size + part.rows * self.form.bytes
            if not whole or {key: header[NAME][key] for key in want} != want:
                raise ValueError("cut off, or other vectors")
        except (ValueError, KeyError, TypeError) as error:
            file.close()
            raise ValueError(f"{path}: damaged ({error}): {_MEND}") from None
        return file


_MEND = "encode all pictures again with vlm index INDEX --rebuild"


def _bytes(rows: Tensor) -> memoryview:
    """Their memory, to be written."""
    return rows.view(torch.uint8).numpy().data.cast("B")


def _fill(file: BinaryIO, memory: memoryview) -> None:
    """Reads as much as there is room for; the system may give less at a time."""
    got = 0
    while got < len(memory):
        count = file.readinto(memory[got:])  # type: ignore[attr-defined]  # an unbuffered file has it
        if not count:
            raise ValueError(f"{file.name}: cut off while it was read: {_MEND}")
        got += count


def between(numbers: Tensor, low: int, high: int) -> Tensor:
    """Of ascending numbers those from `low` to below `high`, counted from `low`."""
    first, last = torch.searchsorted(numbers, torch.tensor([low, high])).tolist()
    return numbers[first:last] - low


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
