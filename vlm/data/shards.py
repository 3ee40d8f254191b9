"""Tar shards of pictures with captions: random access by an index, one sample at a time, nothing unpacked to disk."""

import difflib
import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from jaxtyping import Float, UInt8
from torch import Tensor

from vlm.data.cache import Cache
from vlm.data.fetch import is_address
from vlm.data.image import BadSample
from vlm.data.index import Facts, kept
from vlm.data.plan import Indices
from vlm.data.record import MAX_BYTES, Record
from vlm.data.remote import Place, Remote, at_hand, find, opened
from vlm.data.talk import Talk
from vlm.data.talk_record import TalkRecord
from vlm.data.text import Encoded

MIN_SEEN = 100  # samples before the share of bad ones means something

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A talk as token ids, and what a Q-Former reads beside each of its pictures, if it reads anything."""

    text: Encoded
    instructions: tuple[Encoded, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One picture (or its features) and the captions drawn for it; `known` holds every caption of the record.

    Of a talk: all its pictures, its answers, and its `prompt`.
    """

    key: str
    id: str
    pixels: UInt8[Tensor, "3 H W"] | Float[Tensor, "N C"] | list[UInt8[Tensor, "3 _ _"]]
    captions: list[str]
    known: frozenset[str] = frozenset()
    prompt: Prompt | None = None


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: undecoded picture, all captions, the fields of its json (empty without one).

    A talk may have `more` pictures, or none (`image` is empty then); its answers are the captions.
    """

    key: str
    id: str
    image: bytes
    captions: list[str]
    fields: dict[str, Any]
    more: tuple[bytes, ...] = ()
    talk: Talk | None = None

    @property
    def images(self) -> list[bytes]:
        """All pictures, in the order in which the talk shows them."""
        return [self.image, *self.more] if self.image else []


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


def find_shards(spec: str | Sequence[str], cache: Cache) -> list[Place]:
    """As `expand` for tars, also by address: http(s)://, s3:// and what else fsspec knows, pipe:COMMAND if allowed.

    ValueError: as `expand`; as `vlm.data.remote.find`.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    if not any(map(is_address, patterns)):
        return [*expand(patterns)]
    found = [find(pattern, cache) if is_address(pattern) else expand(pattern) for pattern in patterns]
    return list(dict.fromkeys(file for files in found for file in files))


def _expand_one(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    if is_address(pattern):
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


class Shards:
    """Random access to the samples of tar shards; `talks`: of conversations (`TalkRecord`).

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
        cache: Cache | None = None,
        talks: bool = False,
    ) -> None:
        """Map the index, or read that of every shard (headers only). `cache`: where it and remote shards are kept."""
        cache = cache or Cache()
        self.files = find_shards(spec, cache)
        self.max_bad_fraction = max_bad_fraction
        self._record = (TalkRecord if talks else Record)(image, caption, id_field)
        self._index = kept(self.files, self._record, cache)
        facts = self._index.facts
        self.bad = facts.bad.copy()
        self.others = Counter({suffix: n for suffix, n in facts.seen.items() if not self._record.knows(suffix)})
        self._refuse_unusable(facts)
        for line in [*facts.damage, *facts.hints]:
            log.warning("%s", line)
        fetched = sum(self._index.stamp(n)[0] for n, file in enumerate(self.files) if isinstance(file, Remote))
        if fetched > cache.bytes:
            large = (
                "data.shard_cache_gb=%g: the shards by address take %.3g GB, so they will be fetched again and again"
            )
            log.warning(large, cache.gb, fetched / 2**30)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def starts(self) -> Indices:
        """The first sample of each shard; one without samples begins where the next does."""
        return self._index.starts

    def key(self, index: int) -> str:
        """Name of the sample: its members' common name, folders included."""
        return self._index.key(index)

    def where(self, index: int) -> str:
        """Shard and key, for messages."""
        return f"{self.files[self._index.shard(index)]}: {self.key(index)}"

    def raw(self, index: int) -> RawSample:
        """Read one sample. BadSample when its captions cannot be used; ValueError when the shard has changed."""
        there = [suffix for suffix in self._record.images if self._index.member(index, suffix)[0] >= 0]
        wanted = self._record.pictures(there)
        data = self._read(index, wanted)
        fields, key = self._record.fields(data), self.key(index)
        talk = self._record.talk(fields, len(wanted))
        captions = self._record.texts(data, fields) if talk is None else talk.answers
        first, *more = [data[suffix] for suffix in wanted] or [b""]
        return RawSample(key, self._record.id(key, fields), first, captions, fields, tuple(more), talk)

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
        number = self._index.shard(index)
        file, before = self.files[number], self._index.stamp(number)
        handle, stamp = opened(file, before)
        with handle:
            if stamp != before:
                self._index.forget()
                raise ValueError(f"{file}: changed since it was indexed; start again, and leave shards alone meanwhile")
            data = {}
            for suffix in dict.fromkeys([*images, *self._record.texts_in]):
                offset, size = self._index.member(index, suffix)
                if size > MAX_BYTES:
                    raise BadSample("member too large", f"{suffix}: {size} bytes, at most {MAX_BYTES}")
                if offset >= 0:
                    handle.seek(offset)
                    data[suffix] = handle.read(size)
        return data

    def _refuse_unusable(self, facts: Facts) -> None:
        names = f"{self.files[0]}" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        wanted = f"image={';'.join(self._record.kinds)!r}, caption={self._record.caption_spec!r}"
        if not len(self) and facts.damage:
            raise ValueError("\n".join([*facts.damage[:5], f"{names}: no sample has {self._record.what}"]))
        if not len(self):
            found = (
                ", ".join(f"{suffix} ({count})" for suffix, count in facts.seen.most_common(12)) or "no members at all"
            )
            message = f"{names}: no sample has {self._record.what}. Wanted {wanted}; suffixes found: {found}"
            raise ValueError("\n".join([message, *facts.hints]))
        check_bad(self.bad, len(self) + self.bad.total(), self.max_bad_fraction, names, facts.hints)
        # A misspelt json field shows only inside the samples: a few spread ones tell it before training starts.
        trials = np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int).tolist()
        ready = [index for index in trials if at_hand(self.files[self._index.shard(index)])]
        trials = ready or trials[:1]  # a start downloads one shard at most
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
