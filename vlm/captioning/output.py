"""Where captions go: standard output, a file that a killed run leaves usable, files beside the pictures."""

import fcntl
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np

from vlm.captioning.formats import CSV_HEADER, NotOurs, Result, key, key_of, lines
from vlm.captioning.inputs import SUFFIXES, Named
from vlm.captioning.wishes import Format, Work
from vlm.data.image import BadSample
from vlm.model.transcribe import one_line

JOURNAL = ".part"  # after the name of a file that can be written only as a whole
_REMEDY = "--skip-existing goes on with it, --overwrite replaces it"


@runtime_checkable
class Sink(Protocol):
    """Takes what is said of pictures, in order."""

    def has(self, named: Named) -> bool:
        """Whether this picture is done. BadSample or OSError: it never can be."""
        ...

    def put(self, result: Result) -> None:
        """One more, out of the process's hands afterwards. BadSample: this one cannot be kept."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


def check(work: Work) -> None:
    """Refuses an --output before any work; changes nothing. ValueError."""
    path = work.output
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {path}: is no plain file; take another one")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: no such folder: {path.parent}")
    there = [each for each in (path, _journal(path)) if each.is_file() and each.stat().st_size]
    if there and not (work.skip_existing or work.overwrite):
        raise ValueError(f"--output {there[0]}: exists already; {_REMEDY}")


def opened(work: Work, captions: int) -> Sink:
    """Ready to take results; `captions`: of each picture. ValueError: a file of something else, or in use."""
    if work.format == "sidecar":
        return Sidecars(work.skip_existing, work.overwrite)
    if work.output is None:
        return Standard(work.format)
    if work.format == "coco":
        return Coco(work.output, work.overwrite)
    return Lines(work.output, work.format, work.overwrite, captions)


class Standard:
    """Standard output."""

    def __init__(self, format: Format) -> None:
        """Begins what has a beginning."""
        self._format, self._count = format, 0
        if format == "csv":
            self._write(CSV_HEADER)

    def has(self, named: Named) -> bool:
        """Nothing is known of what went before."""
        return False

    def put(self, result: Result) -> None:
        """Printed at once."""
        text = lines(result, self._format)
        self._write("".join(map(self._entry, text.splitlines())) if self._format == "coco" else text)

    def _entry(self, line: str) -> str:
        self._count += 1
        return ("[\n" if self._count == 1 else ",\n") + line

    def end(self) -> None:
        """Ends what has an end."""
        if self._format == "coco":
            self._write("\n]\n" if self._count else "[]\n")

    @staticmethod
    def _write(text: str) -> None:
        try:
            sys.stdout.buffer.write(_bytes(text))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            # Nobody reads on (`| head`): what Python flushes at its end has nowhere to go either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None


class Lines:
    """A file of one format, which grows by whole lines; what a killed run has not finished of it is cut off."""

    def __init__(self, path: Path, format: Format, overwrite: bool, captions: int = 1) -> None:
        """ValueError: another process writes it, or it holds something else."""
        self._path, self._format = path, format
        self._file = locked(path)
        if overwrite:
            self._file.truncate(0)
        try:
            self._done = _Digests(self._mended(captions))
        except ValueError:
            self._file.close()
            raise
        self._file.seek(0, os.SEEK_END)
        if not self._file.tell() and format == "csv":
            self._write(CSV_HEADER)

    def _mended(self, captions: int) -> Iterator[str]:
        """Pictures that the file has captions of. It ends after the last whole picture then."""
        end = group = rows = 0  # where whole lines end, where the last picture's begin, how many these are
        last: str | None = None
        number = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            if not (number == 1 and self._format == "csv" and line.decode(errors="replace") == CSV_HEADER):
                name = self._key(line, number)
                if name != last or rows >= captions:
                    group, rows, last = end, 0, name
                rows += 1
                if name is not None:
                    yield name
            end += len(line)
        if self._format in ("text", "csv") and 0 < rows < captions:
            end = group
            self._cut = last
        self._file.truncate(end)

    _cut: str | None = None  # a picture some of whose captions are missing

    def _key(self, line: bytes, number: int) -> str | None:
        try:
            return key(line.decode("utf-8", "surrogateescape").removesuffix("\n"), self._format)
        except NotOurs as error:
            raise ValueError(f"--output {self._path}: line {number} is {error}; take another file") from None

    def has(self, named: Named) -> bool:
        """Whether a caption of it stands in the file."""
        name = key_of(named.name, self._format)
        return self._done.asked(name) and name != self._cut

    def put(self, result: Result) -> None:
        """Appended."""
        self._write(lines(result, self._format))

    def _write(self, text: str) -> None:
        try:
            self._file.write(_bytes(text))
            self._file.flush()
        except OSError as error:
            remedy = "what was written before stays; make room and go on with --skip-existing"
            raise OSError(f"--output {self._path}: {error.strerror}; {remedy}") from None

    @property
    def asked_again(self) -> int:
        """Pictures that were done by a name which another one has too."""
        return self._done.asked_again

    def end(self) -> None:
        """On the disk for good."""
        os.fsync(self._file.fileno())
        self._file.close()


_SEVERAL = "several pictures, by the ends of their names"


class Coco:
    """COCO's results, one JSON array: written whole at the end, kept as lines beside it until then."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        """ValueError: as of `Lines`, or what is there is no such array."""
        self._path = path
        journal = _journal(path)
        if path.is_file() and path.stat().st_size and not overwrite and not journal.is_file():
            _replace(journal, (json.dumps(entry, ensure_ascii=False) + "\n" for entry in _array(path)))
        self._lines = Lines(journal, "coco", overwrite)

    def has(self, named: Named) -> bool:
        """Whether the array has a caption of it."""
        return self._lines.has(named)

    def put(self, result: Result) -> None:
        """Kept beside."""
        self._lines.put(result)

    def end(self) -> None:
        """The array takes the place of what was there. Says on stderr which pictures share their number."""
        self._lines.end()
        journal = _journal(self._path)
        with journal.open(encoding="utf-8") as kept:
            _replace(self._path, _joined(kept))
        with journal.open(encoding="utf-8") as kept:
            twice = _Digests(str(json.loads(line)["image_id"]) for line in kept).repeated
        journal.unlink()
        if twice:
            print(f"vlm: {self._path}: {twice} image_id(s) stand for {_SEVERAL}", file=sys.stderr)
        if again := self._lines.asked_again:
            print(
                f"vlm: {self._path}: {again} picture(s) were taken for done, as their image_id is there, and it stands "
                f"for {_SEVERAL}: caption them into another file",
                file=sys.stderr,
            )


def _joined(entries: Iterable[str]) -> Iterator[str]:
    begin = "["
    for line in entries:
        yield begin + "\n" + line.rstrip("\n")
        begin = ","
    yield "[]\n" if begin == "[" else "\n]\n"


def _array(path: Path) -> list[dict[str, object]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [{"image_id": entry["image_id"], "caption": str(entry["caption"])} for entry in entries]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"--output {path}: holds no array of COCO's results; take another file") from None


class Sidecars:
    """A text beside each picture, of the same name, a caption on each line; whole or not there."""

    def __init__(self, skip: bool, overwrite: bool) -> None:
        """What is done with texts that are there."""
        self._skip, self._overwrite = skip, overwrite

    def has(self, named: Named) -> bool:
        """Whether there is a text. BadSample: it is not to be touched; no place is beside the picture."""
        if named.beside is None:
            raise BadSample("nothing can stand beside it", "no file of its own; take --output FILE")
        if str(named.beside) == named.name:
            raise BadSample("its text would take its own place", f"{named.beside}; give it the suffix of a picture")
        if others := [file for file in _alike(named.beside) if not _same(str(file), named.name)]:
            raise BadSample("its text would be that of another picture too", f"{named.beside} of {others[0]}")
        if self._overwrite or not named.beside.exists():
            return False
        if not self._skip:
            raise BadSample("has a text already", f"{named.beside}; --skip-existing or --overwrite")
        return True

    def put(self, result: Result) -> None:
        """Written beside the picture."""
        if not result.captions:
            return
        place = Path(result.name).with_suffix(".txt")
        try:
            _replace(place, (one_line(caption.text) + "\n" for caption in result.captions), self._overwrite)
        except OSError as error:
            raise BadSample("text cannot be written", f"{place}: {error.strerror}") from None

    def end(self) -> None:
        """Nothing is left to do."""


def _same(file: str, name: str) -> bool:
    """One file; some systems find it under a name in other letters too."""
    return file == name or (file.lower() == name.lower() and os.path.samefile(file, name))


def _alike(text: Path) -> list[Path]:
    """Pictures that a text can be of."""
    ends = (end for suffix in sorted(SUFFIXES) for end in (suffix, suffix.upper()))
    return [file for end in ends if (file := text.with_suffix(end)).is_file()]


def locked(path: Path) -> BinaryIO:
    """A file to read and append to, by this process alone. ValueError: another has it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"--output {path}: another process is writing it now") from None
    return file


def _journal(path: Path) -> Path:
    return path.with_name(path.name + JOURNAL)


def _replace(path: Path, parts: Iterable[str], clobber: bool = True) -> None:
    """Writes a file whole or not at all. FileExistsError: it is there, and not to be replaced."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            for part in parts:
                file.write(_bytes(part))
            file.flush()
            os.fsync(file.fileno())
        if clobber:
            draft.replace(path)
        else:
            os.link(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink()


def _bytes(text: str) -> bytes:
    """Names of files are any bytes; they go out as they came."""
    return text.encode("utf-8", "surrogateescape")


class _Digests:
    """A set of names in eight bytes each."""

    def __init__(self, names: Iterable[str]) -> None:
        given = np.fromiter(map(_digest, names), np.uint64)
        self._all = np.unique(given)
        self._asked = np.zeros(len(self._all), dtype=bool)
        self.repeated = len(given) - len(self._all)
        self.asked_again = 0

    def asked(self, name: str) -> bool:
        """Whether it is there; counts what was asked for before."""
        place = int(np.searchsorted(self._all, np.uint64(_digest(name))))
        if place == len(self._all) or int(self._all[place]) != _digest(name):
            return False
        self.asked_again += int(self._asked[place])
        self._asked[place] = True
        return True


def _digest(name: str) -> int:
    data = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
