"""`vlm shards check`: everything that is wrong or odd in tar shards, counted by reason, before a run meets it."""

import io
import json as jsonlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tarfile import TarInfo
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track

from vlm.data.captions import find_captions, json_fields, parse_caption
from vlm.data.image import FORMATS, BadSample, decode
from vlm.data.shards import MAX_BYTES, expand, tar_members
from vlm.data.text import Tokenizer, encode_caption

PICKLES = ("pyd", "pkl", "pickle", "pt", "pth", "ckpt")
_DEPTHS = {"L": "grey", "LA": "alpha", "RGBA": "alpha", "PA": "alpha", "P": "palette", "CMYK": "CMYK", "1": "one bit"}


@dataclass
class Report:
    """Counts by reason. Errors make a sample unusable; notes are handled (or only worth knowing)."""

    shards: int = 0
    samples: int = 0
    unusable: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # where each reason was met first

    def add(self, counts: Counter[str], reason: str, where: str) -> None:
        """One more."""
        counts[reason] += 1
        self.first.setdefault(reason, where)


@dataclass(frozen=True)
class Rules:
    """What is looked for: `image` and `caption` as of `Shards`, the longest text, the smallest side worth having."""

    image: str = "jpg;png;jpeg;webp"
    caption: str = "txt;json:caption"
    min_side: int = 32
    tokenizer: Tokenizer | None = None
    max_tokens: int = 32


def check(spec: str | Sequence[str], rules: Rules | None = None) -> Report:
    """Reads every shard once; in memory are 32 bytes a sample. ValueError: no shards, one that cannot be read."""
    files = expand(spec)
    doctor = _Doctor(files, rules or Rules())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    for number in track(range(len(files)), "shards", console=console, disable=hidden, transient=True):
        doctor.shard(number)
    doctor.compare()
    return doctor.report


class _Doctor:
    def __init__(self, files: Sequence[Path], rules: Rules) -> None:
        self.files, self.rules, self.report = files, rules, Report(shards=len(files))
        self.images = [suffix.strip().lower() for suffix in rules.image.split(";")]
        self.captions = parse_caption(rules.caption)
        self.keys, self.pictures, self.shards, self.places = array("Q"), array("Q"), array("i"), array("q")

    def shard(self, number: int) -> None:
        """All samples of a shard, and its own faults."""
        file, damage = self.files[number], list[str]()
        with file.open("rb") as handle:
            for key, members, start in self._samples(file, damage):
                self.report.samples += 1
                where = f"{file}: {key}"
                try:
                    picture = self._sample(handle, key, members, where)
                except BadSample as bad:
                    self.report.unusable += 1
                    self.report.add(self.report.errors, bad.reason, f"{where} ({bad.detail})" if bad.detail else where)
                    picture = b""
                self.keys.append(_digest(key.encode("utf-8", "replace")))
                self.pictures.append(_digest(picture) if picture else 0)
                self.shards.append(number)
                self.places.append(start)
        for message in damage:
            self.report.add(self.report.errors, "damaged shard", message)

    def _samples(self, file: Path, damage: list[str]) -> Iterator[tuple[str, dict[str, tuple[int, int]], int]]:
        """Key, members by suffix, and place of each sample: members of one name in a row."""
        finished, key = set[str](), ""
        members, start = dict[str, tuple[int, int]](), 0
        for name, offset, size in tar_members(file, damage, lambda odd: self._odd(file, odd)):
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem or not suffix:
                continue
            own, suffix = name[: len(name) - len(suffix) - 1], suffix.lower()
            self._name(file, name, suffix)
            if own != key:
                if members:
                    yield key, members, start
                finished.add(key)
                key, members, start = own, {}, offset
            if own in finished or suffix in members:
                self.report.add(self.report.errors, "members apart or repeated", f"{file}: {name} at byte {offset}")
            members.setdefault(suffix, (offset, size))
        if members:
            yield key, members, start

    def _odd(self, file: Path, member: TarInfo) -> None:
        if not member.isdir():
            kind = "link" if member.issym() or member.islnk() else "device or other special file"
            self.report.add(self.report.notes, f"{kind}, passed over", f"{file}: {member.name}")

    def _name(self, file: Path, name: str, suffix: str) -> None:
        notes, where = self.report.notes, f"{file}: {name}"
        if name.startswith("/") or ".." in name.split("/"):
            self.report.add(notes, "name leads out of its folder", where)
        if suffix.rpartition(".")[2] in PICKLES:
            self.report.add(notes, "pickle, never read", where)
        if "." in suffix and suffix.rpartition(".")[2] in (*self.images, "txt", "json"):
            # photo.v2.jpg and photo.v3.jpg are two members of one sample "photo".
            self.report.add(notes, "dots in the name, which ends at the first", where)

    def _sample(self, handle: BinaryIO, key: str, members: dict[str, tuple[int, int]], where: str) -> bytes:
        """The picture's bytes. BadSample for the first thing that makes the sample unusable."""
        found = next((suffix for suffix in self.images if suffix in members), None)
        if found is None:
            raise BadSample("no image", f"has {', '.join(members)}")
        wanted = dict.fromkeys([found, *(suffix for suffix, _ in self.captions), "json"])
        data = {suffix: _read(handle, *members[suffix]) for suffix in wanted if suffix in members}
        picture = data.pop(found)
        self._captions(data, where)
        self._picture(picture, where)
        return picture

    def _captions(self, data: dict[str, bytes], where: str) -> None:
        texts = find_captions(self.captions, data, json_fields(data["json"]) if "json" in data else {})
        tokenizer, most = self.rules.tokenizer, self.rules.max_tokens
        if tokenizer is not None:
            for text in texts:
                if len(encode_caption(tokenizer, text, 10**6).ids) > most:
                    self.report.add(self.report.notes, f"caption of more than {most} tokens, cut", where)

    def _picture(self, data: bytes, where: str) -> None:
        size = decode(data).size
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode = image.mode
            depth = "16 bit or float" if mode.startswith(("I", "F")) else _DEPTHS.get(mode)
            if depth is None and image.has_transparency_data:
                depth = "alpha"
            odd = {
                f"{depth} picture, made RGB": depth is not None,
                "animated, first frame used": getattr(image, "n_frames", 1) > 1,
                "turned by EXIF": _orientation(image) not in (1, 0),
                f"side below {self.rules.min_side} pixels": min(size) < self.rules.min_side,
            }
        for reason, is_so in odd.items():
            if is_so:
                self.report.add(self.report.notes, reason, where)

    def compare(self) -> None:
        """Keys and pictures that stand there twice."""
        for counts, reason, digests in (
            (self.report.errors, "repeated key", self.keys),
            (self.report.notes, "the same picture again", self.pictures),
        ):
            for index in _again(np.array(digests, dtype=np.uint64)).tolist():
                where = f"{self.files[self.shards[index]]}: sample at byte {self.places[index]}"
                self.report.add(counts, reason, where)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, ValueError, TypeError):  # damaged EXIF, which turns nothing
        return 1


def _again(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Places of all but the first of equal numbers; 0 stands for nothing."""
    order = np.argsort(digests, kind="stable")
    same = np.flatnonzero(digests[order][1:] == digests[order][:-1]) + 1
    found = order[same]
    return np.sort(found[digests[found] != 0])


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") or 1


def _read(handle: BinaryIO, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise BadSample("member too large", f"{size} bytes, at most {MAX_BYTES}")
    handle.seek(offset)
    return handle.read(size)


def as_json(report: Report) -> str:
    """For programs."""
    counts = {"errors": dict(report.errors.most_common()), "notes": dict(report.notes.most_common())}
    totals = {"shards": report.shards, "samples": report.samples, "unusable": report.unusable}
    return jsonlib.dumps(totals | counts | {"first": report.first}, indent=1)


def as_text(report: Report) -> str:
    """For people: what is wrong, what is odd, and where each was met first."""
    lines = [f"{report.samples} samples in {report.shards} shards, {report.unusable} of them unusable"]
    parts: list[tuple[str, Counter[str]]] = [("errors", report.errors), ("notes", report.notes)]
    width = max((len(reason) for _, counts in parts for reason in counts), default=0)
    for title, counts in parts:
        lines += [f"{title}:" if counts else f"{title}: none"]
        for reason, count in counts.most_common():
            share = f"{100 * count / max(report.samples, 1):5.1f} %"
            lines.append(f"  {reason:{width}}  {count:>8,}  {share}  first: {report.first[reason]}")
    return "\n".join(lines)


def healthy(report: Report, max_bad_fraction: float) -> bool:
    """Few enough unusable samples, and nothing that stops a run at its start."""
    stops = report.errors["repeated key"] + report.errors["members apart or repeated"]
    return not stops and report.samples > 0 and report.unusable <= max_bad_fraction * report.samples
