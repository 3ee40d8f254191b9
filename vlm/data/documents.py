"""Documents to pretrain a language model on: from text files, JSON lines and tar shards, one at a time."""

import gzip
import itertools
import json
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.image import BadSample
from vlm.data.loader import MAX_WARNINGS
from vlm.data.record import MAX_BYTES
from vlm.data.shards import check_bad, expand

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".tar")
_END = bytes(1024)  # two blocks of zeros end a tar

log = logging.getLogger(__name__)


class Documents:
    """The documents of a set of files, readable again and again in the same order; only one is in memory at a time.

    `spec`: files, globs, braces {000..009}, folders (their files of SUFFIXES, sorted by name), or a list of these.
    `.txt` is one document a file, `.jsonl` (or `.jsonl.gz`) one a line with the text in `field`, `.tar` one a sample:
    its member txt, or else `field` of its member json (webdataset's rule: members of one name in a row are a sample).
    `bad` counts the unusable documents of the newest pass by reason; a file that is cut off or damaged counts once,
    and what stands before the damage is used.
    ValueError: more than `max_bad_fraction` bad ones, no usable document, a file that cannot be opened.
    """

    def __init__(self, spec: str | Sequence[str], field: str = "text", max_bad_fraction: float = 0.05) -> None:
        """Find the files; none is opened before the first pass."""
        self.files = _find(spec)
        self.field, self.max_bad_fraction = field, max_bad_fraction
        self.bad: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        """One pass over all documents. Line ends and white space are left as they are."""
        self.bad = bad = Counter[str]()
        seen, first = 0, "the files are empty"
        for seen, record in enumerate(itertools.chain.from_iterable(map(_records, self.files)), 1):
            text = ""
            try:
                text = self._text(record.content, record.suffix)
            except BadSample as error:
                first = first if bad else f"{record.where}: {error}"
                if bad.total() < MAX_WARNINGS:
                    log.warning("unusable document %s: %s", record.where, error)
                bad[error.reason] += 1
            check_bad(bad, seen, self.max_bad_fraction, self._name())
            if text:
                yield text
        if seen == bad.total():
            raise ValueError(f"{self._name()}: no document is usable; {first}")

    def _name(self) -> str:
        return f"{self.files[0]}" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")

    def _text(self, content: bytes | BadSample, suffix: str) -> str:
        if isinstance(content, BadSample):
            raise content
        if len(content) > MAX_BYTES:
            raise BadSample("too large", f"more than {MAX_BYTES} bytes")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", str(error)) from None
        if suffix == "json":
            text = self._in_json(text)
        if not text.strip():
            raise BadSample("empty")
        return text if text.isascii() else text.encode("utf-8", "replace").decode()  # lone surrogates from \ud800

    def _in_json(self, text: str) -> str:
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("unreadable json", str(error)) from None
        if not isinstance(fields, dict):
            raise BadSample("unreadable json", "no object with fields")
        if fields.get(self.field) is None:
            raise BadSample("no text", f"field={self.field!r} is not among {', '.join(sorted(fields)) or 'no fields'}")
        if not isinstance(found := fields[self.field], str):
            raise BadSample("not text", repr(found)[:80])
        return found


@dataclass(frozen=True)
class _Record:
    """A document as stored: where it stands, its bytes (or why there are none), and whether they are txt or json."""

    where: str
    content: bytes | BadSample
    suffix: str


def _find(spec: str | Sequence[str]) -> list[Path]:
    if not spec:
        raise ValueError(f"no documents given: name a file ({', '.join(SUFFIXES)}), a pattern, or a folder of them")
    files = expand(spec, SUFFIXES)
    if strange := [file for file in files if not file.name.lower().endswith(SUFFIXES) or file.is_dir()]:
        raise ValueError(f"{strange[0]}: not a file of documents; their names end in one of {', '.join(SUFFIXES)}")
    return files


def _records(file: Path) -> Iterator[_Record]:
    read = {".txt": _whole, ".tar": _samples}.get(file.suffix.lower(), _lines)
    try:
        yield from read(file)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OverflowError, ValueError) as error:
        yield _Record(str(file), BadSample("damaged file", f"{error}; what stands before the damage is used"), "")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None


def _whole(file: Path) -> Iterator[_Record]:
    with file.open("rb") as handle:
        yield _Record(str(file), handle.read(MAX_BYTES + 1), "txt")


def _lines(file: Path) -> Iterator[_Record]:
    """Lines that are not blank; what is too long is cut right after MAX_BYTES, so that it shows."""
    with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as handle:
        for number in itertools.count(1):
            line = rest = handle.readline(MAX_BYTES + 1)
            while len(rest) > MAX_BYTES and not rest.endswith(b"\n"):
                rest = handle.readline(MAX_BYTES + 1)
            if not line:
                return
            if line.strip():
                yield _Record(f"{file}, line {number}", line.removesuffix(b"\n"), "json")


def _samples(file: Path) -> Iterator[_Record]:
    with file.open("rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
        for key, group in itertools.groupby(_members(tar), lambda found: found[0]):
            where, members = f"{file}, {key!r}", dict[str, tarfile.TarInfo]()
            for _, suffix, member in group:
                if members.setdefault(suffix, member) is not member:
                    yield _Record(where, BadSample("comes twice", f"suffix {suffix}; the first is used"), "")
            suffix = "txt" if "txt" in members else "json"
            if suffix not in members:
                yield _Record(where, BadSample("no text", f"it has only {', '.join(sorted(members))}"), "")
                continue
            stream = tar.extractfile(members[suffix])
            assert stream is not None  # a regular file
            yield _Record(where, stream.read(MAX_BYTES + 1), suffix)
        handle.seek(tar.offset)
        if handle.read(len(_END)) != _END:  # tarfile takes a damaged header for the end of the archive
            raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and header of regular files; names without a suffix (README, hidden files) are no samples."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        stem, _, suffix = member.name.rpartition("/")[2].partition(".")
        if stem and suffix and member.isreg():
            yield member.name[: -len(suffix) - 1], suffix.lower(), member
