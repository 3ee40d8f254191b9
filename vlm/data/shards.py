"""Tar shards of pictures with captions: an index for random access, one sample at a time, nothing written to disk."""

import difflib
import glob
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand
from jaxtyping import Float, UInt8
from torch import Tensor

from vlm.data.image import BadSample
from vlm.data.record import MAX_BYTES, Record
from vlm.data.tar import groups

MIN_SEEN = 100  # samples before the share of bad ones means something
_REMEDIES = {
    "duplicate key": "; each sample needs a key of its own, and the first one is used: rename, or name the shard once",
    "members apart": "; the members of a sample must stand side by side: write the shard anew, sorted by name",
    "dotted name": "; the key of a sample ends at the first dot of its file name: rename without dots",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One picture (or its features) and the captions drawn for it; `known` holds every caption of the record."""

    key: str
    id: str
    pixels: UInt8[Tensor, "3 H W"] | Float[Tensor, "N C"]
    captions: list[str]
    known: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: undecoded picture, all captions, the fields of its json (empty without one)."""

    key: str
    id: str
    image: bytes
    captions: list[str]
    fields: dict[str, Any]


def expand(spec: str | Sequence[str], suffixes: tuple[str, ...] = (".tar",)) -> list[Path]:
    """Files of a pattern, or of several: braces {000..003}, globs, a folder (its files of `suffixes`), plain paths.

    Order: as written, sorted within a glob or folder; a file named twice counts once. ValueError when nothing matches.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    files = [file for pattern in patterns for file in _expand_one(pattern, suffixes)]
    if not files:
        raise ValueError(
            "no shards given: name a tar file, a pattern such as train-{000..009}.tar, or a folder of tars"
        )
    return list(dict.fromkeys(files))


def _expand_one(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    if pattern.startswith("pipe:") or re.match(r"[A-Za-z][\w+.-]+://", pattern):
        raise ValueError(
            f"shards {pattern!r}: only local files are read, no commands or addresses; download them first"
        )
    files: list[Path] = []
    for name in [pattern] if os.path.exists(pattern) else braceexpand(os.path.expanduser(pattern)):
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
        else:
            found = [path] if path.exists() else sorted(Path(hit) for hit in glob.glob(name, recursive=True))
        if not found:
            raise ValueError(f"shards {pattern!r}: {_nearest(path, suffixes)}")
        files += found
    return files


def _nearest(path: Path, suffixes: tuple[str, ...]) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    likely = [name for name in names if name.endswith(suffixes)]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or likely[:3] or names[:3]
    missing = f"no {' or '.join(suffixes)} file in {folder}" if path.is_dir() else f"no file matches {path}"
    return f"{missing}; {'that folder holds ' + ', '.join(near) if near else 'that folder is empty'}"


class _Table:
    """The index while it is read: flat arrays, since one object per member would take ten times the memory."""

    def __init__(self, columns: dict[str, int]) -> None:
        """`columns`: the suffixes that are kept."""
        self.columns = columns
        self.places = array("q")  # per sample: offset and size of each column's member; offset -1: absent
        self.shards = array("i")
        self.keys, self.ends, self.hashes = bytearray(), array("q"), array("q")

    def add(self, shard: int, key: str, members: dict[str, tuple[int, int]]) -> None:
        """One more sample."""
        for suffix in self.columns:
            self.places.extend(members.get(suffix, (-1, 0)))
        self.shards.append(shard)
        self.keys += key.encode()
        self.ends.append(len(self.keys))
        self.hashes.append(hash(key))


class Shards:
    """Random access to the samples of tar shards.

    `image`: suffixes, `caption`: "txt" (one caption a line) or "json:FIELD" (a string or a list), first found wins.
    `id_field`: json field that says which samples show the same thing; the key without one.
    Unusable samples are left out and counted in `bad` by reason, the first of one key excepted; so is a shard that is
    cut off or damaged, of which the samples before the damage are used. `others`: members of no use here, by suffix.
    ValueError: more than `max_bad_fraction` bad ones, no usable sample at all.
    """

    def __init__(
        self,
        spec: str | Sequence[str],
        image: str = "jpg;png;jpeg;webp",
        caption: str = "txt;json:caption",
        id_field: str | None = None,
        max_bad_fraction: float = 0.05,
    ) -> None:
        """Read the index of every shard (headers only)."""
        self.files = expand(spec)
        self.bad: Counter[str] = Counter()
        self._damage: list[str] = []
        self._hints: list[str] = []  # the first of each fault that names or order explain
        self.max_bad_fraction = max_bad_fraction
        self._record = Record(image, caption, id_field)
        self._columns = self._record.columns
        table, seen = _Table(self._columns), Counter[str]()
        self._stamps = [self._index(number, table, seen) for number in range(len(self.files))]
        self.others = Counter({suffix: count for suffix, count in seen.items() if suffix not in self._columns})
        self._shard = np.array(table.shards, dtype=np.int32)
        self._place = np.array(table.places, dtype=np.int64).reshape(-1, len(self._columns), 2)
        self._keys, self._ends = bytes(table.keys), np.array(table.ends, dtype=np.int64)
        self._drop_repeats(np.array(table.hashes, dtype=np.int64))
        self._refuse_unusable(seen)
        for line in [*self._damage, *self._hints]:
            log.warning("%s", line)

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first sample of each shard; one without samples begins where the next does."""
        return np.searchsorted(self._shard, np.arange(len(self.files)))

    def key(self, index: int) -> str:
        """Name of the sample: its members' common name, folders included."""
        start = int(self._ends[index - 1]) if index else 0
        return self._keys[start : int(self._ends[index])].decode()

    def where(self, index: int) -> str:
        """Shard and key, for messages."""
        return f"{self.files[self._shard[index]]}: {self.key(index)}"

    def raw(self, index: int) -> RawSample:
        """Read one sample. BadSample when its captions cannot be used; ValueError when the shard has changed."""
        wanted = next(suffix for suffix in self._record.images if self._place[index, self._columns[suffix], 0] >= 0)
        data = self._read(index, [wanted])
        fields, key = self._record.fields(data), self.key(index)
        return RawSample(key, self._record.id(key, fields), data[wanted], self._record.texts(data, fields), fields)

    def captions(self) -> Iterator[str]:
        """All captions of all usable samples, in order; pictures are not read."""
        for index in range(len(self)):
            try:
                data = self._read(index, [])
                yield from self._record.texts(data, self._record.fields(data))
            except BadSample:
                continue

    def _read(self, index: int, images: list[str]) -> dict[str, bytes]:
        """Members with captions, json, and the images named, by suffix."""
        number = int(self._shard[index])
        file = self.files[number]
        wanted = dict.fromkeys([*images, *self._record.texts_in])
        with file.open("rb") as handle:
            stat = os.fstat(handle.fileno())
            if (stat.st_size, stat.st_mtime_ns) != self._stamps[number]:
                raise ValueError(f"{file}: changed since it was indexed; start again, and leave shards alone meanwhile")
            data = {}
            for suffix in wanted:
                offset, size = self._place[index, self._columns[suffix]].tolist()
                if size > MAX_BYTES:
                    raise BadSample("member too large", f"{suffix}: {size} bytes, at most {MAX_BYTES}")
                if offset >= 0:
                    handle.seek(offset)
                    data[suffix] = handle.read(size)
        return data

    def _index(self, number: int, table: _Table, seen: Counter[str]) -> tuple[int, int]:
        """Add one shard to the table; returns its size and time of change."""
        file = self.files[number]
        stat = file.stat()
        damaged = len(self._damage)
        for group in groups(file, self._damage):
            seen.update(group.members.keys())
            fault = self._record.fault(group)
            if not fault:
                table.add(number, group.key, group.members)
            elif len(self._damage) == damaged:  # else it is cut off: counted once, as the shard
                self._count(fault, f"{file}: {group.key!r} ({', '.join(group.members)})")
        if len(self._damage) > damaged:
            self.bad["damaged shard"] += 1
            self._damage[-1] += f"; the {table.shards.count(number)} samples before that are used"
        return stat.st_size, stat.st_mtime_ns

    def _count(self, fault: str, example: str) -> None:
        if fault not in self.bad and fault in ("duplicate key", "members apart", "dotted name"):
            self._hints.append(f"{fault}: {example}{_REMEDIES[fault]}")
        self.bad[fault] += 1

    def _drop_repeats(self, hashes: npt.NDArray[np.int64]) -> None:
        """Of samples of one key the first is kept."""
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        keep = np.ones(len(hashes), dtype=bool)
        pairs = sorted((int(order[place + 1]), int(order[place])) for place in same.tolist())
        for second, first in pairs:
            if self.key(first) == self.key(second):
                keep[second] = False
                self._count("duplicate key", f"{self.where(first)}, and again in {self.files[self._shard[second]]}")
        if not keep.all():
            kept = [self.key(index).encode() for index in np.flatnonzero(keep).tolist()]
            self._keys, self._ends = b"".join(kept), np.cumsum([len(key) for key in kept], dtype=np.int64)
            self._shard, self._place = self._shard[keep], self._place[keep]

    def _refuse_unusable(self, seen: Counter[str]) -> None:
        names = f"{self.files[0]}" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        wanted = f"image={';'.join(self._record.images)!r}, caption={self._record.caption_spec!r}"
        if not len(self) and self._damage:
            raise ValueError("\n".join([*self._damage[:5], f"{names}: no sample has both picture and caption"]))
        if not len(self):
            found = ", ".join(f"{suffix} ({count})" for suffix, count in seen.most_common(12)) or "no members at all"
            message = f"{names}: no sample has both picture and caption. Wanted {wanted}; suffixes found: {found}"
            raise ValueError("\n".join([message, *self._hints]))
        check_bad(self.bad, len(self) + self.bad.total(), self.max_bad_fraction, names, self._hints)
        # A misspelt json field shows only inside the samples: a few spread ones tell it before training starts.
        trials = np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int).tolist()
        reasons = Counter(reason for index in trials if (reason := self._trial(index)))
        if reasons.total() == len(trials):
            raise ValueError(f"{names}: none of {len(trials)} samples tried is usable: {reasons.most_common(1)[0][0]}")

    def _trial(self, index: int) -> str:
        """Why the sample cannot be used, with the fields of its json; empty when it can."""
        try:
            self.raw(index)
        except BadSample as bad:
            try:
                names = sorted(self._record.fields(self._read(index, [])))
            except BadSample:
                return str(bad)
            return f"{bad}; fields of its json: {', '.join(names)}" if names else str(bad)
        return ""


def check_bad(bad: Counter[str], seen: int, limit: float, where: str, hints: Sequence[str] = ()) -> None:
    """ValueError, followed by `hints`, when more than `limit` of at least MIN_SEEN samples were bad."""
    if seen >= MIN_SEEN and bad.total() > limit * seen:
        counts = ", ".join(f"{reason}: {count}" for reason, count in bad.most_common())
        message = (
            f"{where}: {bad.total()} of {seen} samples are unusable ({counts}), more than max_bad_fraction={limit}; "
            "repair the shards, or raise max_bad_fraction"
        )
        raise ValueError("\n".join([message, *hints]))
