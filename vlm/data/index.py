"""Where the samples of tar shards stand: read from the headers once, kept in a file, mapped into memory from then on.

Letters: F shards, N samples, C suffixes that occur, K bytes of all keys.
"""

import hashlib
import json
import logging
import os
import zlib
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from vlm.data.cache import TAG, Cache, alone, used
from vlm.data.plan import Indices
from vlm.data.record import Record
from vlm.data.remote import Place, Stamp, opened
from vlm.data.tar import groups

_FORMAT = 1  # another number whenever the same shards would give another file
_BLOCK = 512  # bytes; members of a tar begin at multiples of it
_REMEDIES = {
    "duplicate key": "; each sample needs a key of its own, and the first one is used: rename, or name the shard once",
    "members apart": "; the members of a sample must stand side by side: write the shard anew, sorted by name",
    "dotted name": "; the key of a sample ends at the first dot of its file name: rename without dots",
}

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]


@dataclass
class Facts:
    """What is told of all shards. `damage`: a line for each damaged one; `hints`: the first fault of a kind."""

    columns: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)  # members by suffix
    damage: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def count(self, fault: str, example: str) -> None:
        """One more bad sample."""
        if fault not in self.bad and fault in _REMEDIES:
            self.hints.append(f"{fault}: {example}{_REMEDIES[fault]}")
        self.bad[fault] += 1


@dataclass(frozen=True)
class Index:
    """The samples in order. A member's place is its first block (0: absent) and its bytes, four bytes each."""

    shards: Array  # int64 F 4: samples up to its last, bytes of keys up to its last, stamp
    places: Array  # uint32 N C 2
    ends: Array  # uint32 N: of the keys, counted from the shard's first
    keys: Array  # uint8 K
    facts: Facts
    path: Path | None = None  # the file it is mapped from

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> Any:
        """For another process: not the arrays, but the file that it can map as well."""
        if self.path is not None:
            return _again, (self.path,)
        return Index, (self.shards, self.places, self.ends, self.keys, self.facts)

    @cached_property
    def _samples(self) -> list[int]:
        return [int(count) for count in self.shards[:, 0]]

    @property
    def starts(self) -> Indices:
        """The first sample of each shard."""
        return np.concatenate([[0], self.shards[:-1, 0]]).astype(np.int64)

    def shard(self, index: int) -> int:
        """Number of a sample's shard."""
        return bisect(self._samples, index)

    def stamp(self, shard: int) -> Stamp:
        """Of the shard as it was read."""
        return int(self.shards[shard, 2]), int(self.shards[shard, 3])

    def key(self, index: int) -> str:
        """Name of a sample."""
        shard = self.shard(index)
        first, base = (int(self.shards[shard - 1, column]) if shard else 0 for column in (0, 1))
        start = int(self.ends[index - 1]) if index > first else 0
        return self.keys[base + start : base + int(self.ends[index])].tobytes().decode()

    def member(self, index: int, suffix: str) -> tuple[int, int]:
        """Offset and bytes of a sample's member; offset -1: absent."""
        if suffix not in self.facts.columns:
            return -1, 0
        block, size = self.places[index, self.facts.columns.index(suffix)].tolist()
        return (block * _BLOCK, size) if block else (-1, 0)

    def forget(self) -> None:
        """Removes the file, which no longer fits the shards: the next start makes it anew."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


# --- made of shards --------------------------------------------------------------------------------------------------


class _Table:
    """The index while it is read: flat arrays, since one object per member would take ten times the memory."""

    def __init__(self, columns: Sequence[str]) -> None:
        """`columns`: the suffixes that are kept."""
        self.columns = columns
        self.places, self.shards = array("I"), array("I")
        self.keys, self.lengths, self.hashes = bytearray(), array("I"), array("q")

    def add(self, shard: int, key: str, members: dict[str, tuple[int, int]]) -> None:
        """One more sample."""
        for suffix in self.columns:
            offset, size = members.get(suffix, (0, 0))
            self.places.extend((offset // _BLOCK, min(size, 2**32 - 1)))
        name = key.encode()
        self.shards.append(shard)
        self.keys += name
        self.lengths.append(len(name))
        self.hashes.append(hash(key))

    def index(self, stamps: Sequence[Stamp], facts: Facts, keep: Array | None = None) -> Index:
        """All samples, or those to `keep`; columns without a member are left out."""
        shard, lengths, keys = np.asarray(self.shards), np.asarray(self.lengths), np.asarray(self.keys, dtype=np.uint8)
        places = np.asarray(self.places).reshape(-1, len(self.columns), 2)
        if keep is not None:
            keys = keys[np.repeat(keep, lengths)]
            shard, lengths, places = shard[keep], lengths[keep], places[keep]
        occur = np.flatnonzero(places[:, :, 0].any(axis=0))
        facts.columns = [self.columns[number] for number in occur.tolist()]
        counts = np.bincount(shard, minlength=len(stamps))
        ends = np.cumsum(lengths, dtype=np.int64)
        samples = np.cumsum(counts)
        bases = np.concatenate([[0], ends])[samples]
        ends -= np.repeat(np.concatenate([[0], bases[:-1]]), counts)
        shards = np.column_stack([samples, bases, np.array(stamps, dtype=np.int64).reshape(-1, 2)])
        return Index(shards, np.ascontiguousarray(places[:, occur]), ends.astype(np.uint32), keys, facts)


def build(files: Sequence[Place], record: Record) -> Index:
    """Reads the headers of all shards; of samples of one key the first is kept. ValueError: one that is compressed."""
    table, facts = _Table(list(record.columns)), Facts()
    console = Console(stderr=True)
    hidden = not console.is_terminal or len(files) == 1
    shown = track(range(len(files)), "indexing", console=console, disable=hidden, transient=True)
    stamps = [_read(files[number], number, record, table, facts) for number in shown]
    index = table.index(stamps, facts)
    keep = np.ones(len(index), dtype=bool)
    for first, second in _repeats(np.asarray(table.hashes)):
        if index.key(first) == index.key(second):
            keep[second] = False
            where, again = f"{files[index.shard(first)]}: {index.key(first)}", files[index.shard(second)]
            facts.count("duplicate key", f"{where}, and again in {again}")
    return index if keep.all() else table.index(stamps, facts, keep)


def _read(file: Place, number: int, record: Record, table: _Table, facts: Facts) -> Stamp:
    handle, stamp = opened(file)
    if stamp[0] > _BLOCK * 2**32:
        raise ValueError(f"{file}: is larger than 2 TiB; write it as several shards")
    damaged, before = len(facts.damage), len(table.shards)
    with handle:
        for group in groups(handle, str(file), facts.damage):
            facts.seen.update(group.members.keys())
            fault = record.fault(group)
            if not fault:
                table.add(number, group.key, record.members(group))
            elif len(facts.damage) == damaged:  # else it is cut off: counted once, as the shard
                facts.count(fault, f"{file}: {group.key!r} ({', '.join(group.members)})")
    if len(facts.damage) > damaged:
        facts.bad["damaged shard"] += 1
        facts.damage[-1] += f"; the {len(table.shards) - before} samples before that are used"
    return stamp


def _repeats(hashes: Array) -> list[tuple[int, int]]:
    """Neighbours among samples of one hash, by the later one."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    return sorted(zip(order[same].tolist(), order[same + 1].tolist(), strict=True), key=lambda pair: pair[1])


# --- kept in a file --------------------------------------------------------------------------------------------------


def kept(files: Sequence[Place], record: Record, cache: Cache) -> Index:
    """The index from its file in the cache, or made and kept there; one process of a machine makes it, others wait.

    A shard that changed, or other suffixes, give it another name. Where no file can be kept, it is in memory alone.
    Errors: as `build`.
    """
    path = cache.folder / "index" / f"{_key(files, record)}.index"
    with ExitStack() as stack:
        try:
            if (there := _mapped(path)) is not None:
                return there
            draft = stack.enter_context(
                alone(path.with_suffix(".part"), "another process reads the shards; waiting for it")
            )
            if (there := _mapped(path)) is not None:
                return there
        except OSError as error:
            log.warning("%s: %s; the index is made anew at every start (data.shard_cache)", path, error.strerror)
            return build(files, record)
        made = build(files, record)
        try:
            _write(made, draft)
            path.with_suffix(".part").replace(path)
            return _mapped(path) or made
        except OSError as error:
            log.warning("%s: %s; the index is made anew at every start (data.shard_cache)", path, error.strerror)
            return made


def _key(files: Sequence[Place], record: Record) -> str:
    """Of all that decides what is in the index."""
    shards: list[list[Any]] = []
    for file in files:
        if isinstance(file, Path):
            stat = file.stat()
            shards.append([str(file), os.path.abspath(file), stat.st_size, stat.st_mtime_ns])
        else:
            shards.append([str(file), file.tag, file.listed])
    settings = [_FORMAT, record.kinds, [suffix for suffix, _ in record.captions]]
    return hashlib.sha256(json.dumps([settings, shards]).encode()).hexdigest()[:TAG]


def _write(index: Index, file: BinaryIO) -> None:
    """Arrays one after the other, each as in a .npy file, the facts as JSON; at the end the sum of all."""
    facts = np.frombuffer(json.dumps(vars(index.facts)).encode(), dtype=np.uint8)
    for content in (index.shards, index.places, index.ends, index.keys, facts):
        np.lib.format.write_array(file, content, version=(1, 0), allow_pickle=False)
    file.flush()
    file.seek(0)
    file.write(_sum(file, os.fstat(file.fileno()).st_size))
    file.flush()
    os.fsync(file.fileno())


def _sum(file: BinaryIO, size: int) -> bytes:
    """Of the first bytes of a file. It is read, not mapped: so the memory of the process stays as it is."""
    total = 0
    while size > 0 and (chunk := file.read(min(size, 2**20))):
        total = zlib.crc32(chunk, total)
        size -= len(chunk)
    return total.to_bytes(4, "little")


def _mapped(path: Path) -> Index | None:
    """The index of a file; None where there is none, or a damaged one."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        if _sum(file, os.fstat(file.fileno()).st_size - 4) != file.read(4):
            log.warning("%s: this index is damaged; it is made anew", path)
            path.unlink(missing_ok=True)
            return None
        file.seek(0)
        take = partial(_array, file)
        arrays = take(np.int64), take(np.uint32), take(np.uint32), take(np.uint8)
        stored = json.loads(take(np.uint8).tobytes())
    used(path)
    facts = Facts(**stored | {name: Counter(stored[name]) for name in ("bad", "seen")})
    return Index(*arrays, facts, path)


def _array(file: BinaryIO, dtype: type[np.generic]) -> Array:
    """The next array of a file, mapped."""
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    assert found == dtype, f"{found} in place of {dtype}"
    begin = file.tell()
    array = np.empty(shape, found) if 0 in shape else np.asarray(np.memmap(file, found, "r", begin, shape))
    file.seek(begin + array.nbytes)
    return array


def _again(path: Path) -> Index:
    if (found := _mapped(path)) is None:
        raise ValueError(f"{path}: this index of shards is gone; start again")
    return found
