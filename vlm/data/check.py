"""The shard doctor: every sample of tar shards looked at once and counted by what is wrong with it, or unusual."""

import hashlib
import multiprocessing
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from vlm.data.encode import encode_prompt
from vlm.data.fetch import listed
from vlm.data.image import TRAITS, BadSample, decode, traits
from vlm.data.record import MAX_BYTES, Record
from vlm.data.remote import Place, opened
from vlm.data.talk import Talk
from vlm.data.talk_batch import TalkForm
from vlm.data.tar import Group, groups
from vlm.data.template import Template
from vlm.data.text import Tokenizer, encode_caption

_MORE = ("caption cut", "dotted name")  # notes of a sample beside the traits of its picture
NOTES = (*TRAITS, *_MORE)
_UNCUT = 2**20  # more tokens than MAX_CHARACTERS can make


@dataclass(frozen=True)
class TextLimit:
    """The longest text of a run: `max_tokens` with the control tokens, and the words of its template."""

    tokenizer: Tokenizer
    max_tokens: int
    template: str | Template | None = None
    talks: TalkForm | None = None  # of conversations

    def cuts(self, caption: str) -> bool:
        """Whether the caption loses words in training."""
        whole = len(encode_caption(self.tokenizer, caption, _UNCUT).ids)
        if self.template is not None:
            whole = max(whole, len(encode_prompt(self.tokenizer, self.template, caption, 0, _UNCUT).ids))
        return whole > self.max_tokens

    def cuts_talk(self, talk: Talk) -> bool:
        """The same of a conversation. BadSample when it has no room for any answer."""
        return self.talks is not None and self.talks.cuts(talk)


@dataclass(frozen=True)
class Patience:
    """What a picture and a caption must be: the shorter side in pixels, the most pixels, the longest text (if told)."""

    min_side: int = 1
    max_pixels: int = 50_000_000
    text: TextLimit | None = None


@dataclass(frozen=True)
class Finding:
    """How often a reason was met, and where first ("shard: key")."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Report:
    """Of all shards: `errors` make a sample unusable (one reason each), `notes` do not. Most frequent first."""

    samples: int
    errors: list[Finding]
    notes: list[Finding]

    @property
    def bad(self) -> int:
        """Unusable samples."""
        return sum(finding.count for finding in self.errors)


@dataclass
class _Seen:
    """Of one shard, 22 bytes a sample: hashes, the number of its error's reason (-1: none), its notes as bits."""

    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    pictures: "array[int]" = field(default_factory=lambda: array("Q"))  # 0: none
    errors: "array[int]" = field(default_factory=lambda: array("h"))
    notes: "array[int]" = field(default_factory=lambda: array("I"))
    reasons: dict[str, str] = field(default_factory=dict)  # with the key they were first met at
    odd: Counter[str] = field(default_factory=Counter)  # members that are passed over, by what is odd about them
    examples: dict[str, str] = field(default_factory=dict)  # of notes and odd members

    def add(self, key: str, error: str, notes: Sequence[str], key_hash: int, picture: int) -> None:
        """One more sample."""
        if error:
            self.reasons.setdefault(error, key)
        for note in notes:
            self.examples.setdefault(note, key)
        self.errors.append(list(self.reasons).index(error) if error else -1)
        self.notes.append(sum(1 << NOTES.index(note) for note in notes))
        self.keys.append(key_hash)
        self.pictures.append(picture)

    def pass_over(self, oddity: str, name: str) -> None:
        """One more odd member."""
        self.odd[oddity] += 1
        self.examples.setdefault(oddity, name)


def check(
    files: Sequence[Place],
    record: Record,
    patience: Patience,
    workers: int = 0,
    done: Callable[[], object] = lambda: None,
) -> Report:
    """Look at all samples; the report does not depend on `workers` (processes beside this one).

    `done` is called after each shard.

    A sample counts under the first reason met: its names, its captions, its picture; one whose key an earlier sample
    has, as "duplicate key". A bad shard counts as one more: "damaged shard", or "changed shard" where its sum is not
    the one that the index.json beside it lists. Errors: a file that cannot be read, or is compressed.
    """
    look = partial(_look, record=record, patience=patience)
    if workers < 1:
        return _merge(files, list(_each(map(look, files), done)))
    # A forked child would inherit locks of the tokenizer's and torch's threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return _merge(files, list(_each(pool.map(look, files), done)))


def _each(found: Iterable[_Seen], done: Callable[[], object]) -> Iterator[_Seen]:
    for seen in found:
        yield seen
        done()


def _look(file: Place, record: Record, patience: Patience) -> _Seen:
    seen, damage = _Seen(), list[str]()
    with opened(file)[0] as handle:
        for group in groups(handle, str(file), damage, seen.pass_over):
            error, notes, picture = record.fault(group), list[str](), 0
            if damage and error:
                continue  # cut off: counted once, as the shard
            if not error:
                error, notes, picture = _sample(handle, group, record, patience)
            if not error and record.dotted(group):
                notes.append("dotted name")
            seen.add(_shown(group.key), error, notes, 0 if record.fault(group) else _hash(group.key.encode()), picture)
    if damage:
        seen.add(damage[0].removeprefix(f"{file}: "), "damaged shard", [], 0, 0)
    elif changed := _changed(file):
        seen.add(changed, "changed shard", [], 0, 0)
    return seen


def _changed(file: Place) -> str:
    """What says that the bytes are others than the index.json beside them lists; empty where none does."""
    if not isinstance(file, Path) or not (index := file.with_name("index.json")).is_file():
        return ""  # one by address was compared when it was fetched
    if (wanted := listed(index.read_bytes()).get(file.name)) is None:
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while part := handle.read(2**20):
            digest.update(part)
    if digest.hexdigest() == wanted.sha256:
        return ""
    return f"sha256 {digest.hexdigest()[:12]}…, index.json lists {wanted.sha256[:12]}…; fetch or write it anew"


def _sample(handle: BinaryIO, group: Group, record: Record, patience: Patience) -> tuple[str, list[str], int]:
    """The reason it cannot be used or "", notes, the hash of its picture (0 without one)."""
    members, picture = record.members(group), 0
    names = record.pictures(members)
    try:
        data = {name: _read(handle, *members[name]) for name in [*names, *record.texts_in] if name in members}
        picture = _hash(b"".join(data[name] for name in names)) if names else 0
        fields = record.fields(data)
        record.id(group.key, fields)
        talk = record.talk(fields, len(names))
        captions = record.texts(data, fields) if talk is None else []
        for name in names:
            image = decode(data[name], patience.max_pixels)
            if min(image.size) < patience.min_side:
                raise BadSample("too small", f"{image.width} x {image.height}")
        cut = patience.text is not None and _cut(patience.text, talk, captions)
    except BadSample as bad:
        return bad.reason, [], picture
    found = {trait for name in names for trait in traits(data[name])}
    return "", [*(trait for trait in TRAITS if trait in found), *["caption cut"] * cut], picture


def _cut(limit: TextLimit, talk: Talk | None, captions: Sequence[str]) -> bool:
    return any(map(limit.cuts, captions)) if talk is None else limit.cuts_talk(talk)


def _read(handle: BinaryIO, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise BadSample("member too large", f"{size} bytes, at most {MAX_BYTES}")
    handle.seek(offset)
    return handle.read(size)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def _shown(key: str) -> str:
    return key.encode("utf-8", "backslashreplace").decode()


def _merge(files: Sequence[Place], seen: Sequence[_Seen]) -> Report:
    keys, pictures = (_joined([getattr(one, name) for one in seen], np.uint64) for name in ("keys", "pictures"))
    starts = np.cumsum([0, *(len(one.keys) for one in seen)])

    def where(place: int) -> str:
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return f"{files[number]}: {_key_at(files[number], place - int(starts[number]))}"

    again = _repeats(keys)
    counts, first = Counter[str](), dict[str, str]()
    for file, one, start in zip(files, seen, starts[:-1].tolist(), strict=True):
        errors = np.array(one.errors)[~again[start : start + len(one.errors)]]
        for number, (reason, key) in enumerate(one.reasons.items()):
            counts[reason] += int((errors == number).sum())
            first.setdefault(reason, f"{file}: {key}")
    if again.any():
        counts["duplicate key"] += int(again.sum())
        first.setdefault("duplicate key", where(int(np.flatnonzero(again)[0])))
    notes, noted = _notes(files, seen)
    if (same := _repeats(pictures) & ~again).any():
        notes["duplicate picture"], noted["duplicate picture"] = int(same.sum()), where(int(np.flatnonzero(same)[0]))
    return Report(len(keys), _findings(counts, first), _findings(notes, noted))


def _notes(files: Sequence[Place], seen: Sequence[_Seen]) -> tuple[Counter[str], dict[str, str]]:
    counts, first = Counter[str](), dict[str, str]()
    for file, one in zip(files, seen, strict=True):
        bits = np.array(one.notes, dtype=np.uint64)
        for number, note in enumerate(NOTES):
            counts[note] += int((bits >> np.uint64(number) & np.uint64(1)).sum())
        counts += one.odd
        for note, example in one.examples.items():
            first.setdefault(note, f"{file}: {_shown(example)}")
    return counts, first


def _findings(counts: Counter[str], first: dict[str, str]) -> list[Finding]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Finding(reason, count, first[reason]) for reason, count in ordered if count]


def _joined(parts: "Sequence[array[int]]", dtype: type[np.uint64]) -> npt.NDArray[np.uint64]:
    return np.concatenate([np.array(part, dtype=dtype) for part in parts])


def _repeats(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """True where an earlier sample has the same hash; 0 is no hash."""
    order = np.argsort(hashes, kind="stable")
    again = np.zeros(len(hashes), dtype=bool)
    again[order[1:]] = (hashes[order[1:]] == hashes[order[:-1]]) & (hashes[order[1:]] != 0)
    return again


def _key_at(file: Place, place: int) -> str:
    """Key of a sample by its number in the shard; reads headers again, so that keys need not be kept."""
    with opened(file)[0] as handle:
        return _shown(next(islice(groups(handle, str(file), []), place, None)).key)
