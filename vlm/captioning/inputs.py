"""Pictures as they are named: files, folders, patterns, lists, tar shards, addresses; one by one, none read ahead."""

import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from io import BufferedIOBase, FileIO, RawIOBase
from itertools import islice
from pathlib import Path

from vlm.data import fetch
from vlm.data.image import BadSample
from vlm.data.tar import members

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
SHARD = ".tar"
STDIN = "-"
LARGEST = 2**28  # bytes of a file
LARGEST_SENT = 2**26  # bytes of a picture that comes over a network
LONGEST = 2**16  # bytes of a name in a list
_CHUNK = 2**16


@dataclass(frozen=True)
class Named:
    """A picture by the name that results tell; `read` gives its bytes, or raises BadSample or OSError.

    `beside`: the file that a caption beside it goes to; None where there is no such place.
    """

    name: str
    read: Callable[[], bytes]
    beside: Path | None = None


@dataclass(frozen=True)
class Given:
    """What the command line names, and how it is to be read; `stdin` is where `-` reads its list."""

    names: Sequence[str]
    stdin: RawIOBase | BufferedIOBase
    null: bool = False
    allow_url: bool = False

    def check(self) -> None:
        """ValueError or OSError: a name that gives no picture; a list and an address are not looked at."""
        if self.names.count(STDIN) > 1:
            raise ValueError(f"{STDIN} is named {self.names.count(STDIN)} times: there is one standard input")
        for name in self.names:
            if name != STDIN:
                next(self._expand(name), None)

    def __iter__(self) -> Iterator[Named]:
        """All pictures, in order. ValueError: standard input is no list of names."""
        for name in self.names:
            if name == STDIN:
                yield from self._listed()
            else:
                yield from self._expand(name)

    def _expand(self, name: str) -> Iterator[Named]:
        if os.path.isdir(name):
            yield from _some(walk(name), f"{name}: no picture in this folder ({_KNOWN})")
        elif os.path.exists(name):
            yield from tar(name) if name.lower().endswith(SHARD) else [file(name)]
        elif "://" in name:
            yield self._sent(name)
        elif glob.has_magic(name):
            yield from _some(matching(name), f"{name}: matches no picture and no {SHARD} ({_KNOWN})")
        else:
            raise ValueError(f"{name}: no such file or folder")

    def _sent(self, address: str) -> Named:
        if not self.allow_url:
            raise ValueError(f"{fetch.shown(address)}: an address; --allow-url has it fetched")
        if not address.lower().startswith(("http://", "https://")):
            raise ValueError(f"{address}: pictures are fetched by http:// and https:// alone")
        return Named(address, partial(sent, address))

    def _listed(self) -> Iterator[Named]:
        """What a list names; a name that cannot be used is a bad picture, not the end of the list."""
        for name in names_in(self.stdin, self.null):
            try:
                first = next(found := self._listed_one(name))
            except (ValueError, OSError) as error:
                yield _bad(name, BadSample("bad name", str(error).removeprefix(f"{name}: ")))
                continue
            yield first
            yield from found

    def _listed_one(self, name: str) -> Iterator[Named]:
        # A list holds names that something has found: brackets in them are no pattern.
        if glob.has_magic(name) and not os.path.exists(name) and "://" not in name:
            raise ValueError("no such file or folder")
        return self._expand(name)


_KNOWN = ", ".join(sorted(SUFFIXES))


def _some(found: Iterator[Named], problem: str) -> Iterator[Named]:
    """The same, but ValueError where there are none."""
    first = next(found, None)
    if first is None:
        raise ValueError(problem)
    yield first
    yield from found


def standard_input() -> RawIOBase:
    """Without a buffer, so that what has come of a list can be had at once. ValueError: it was closed."""
    try:
        return FileIO(0, closefd=False)
    except OSError as error:
        raise ValueError(f"{STDIN}: there is no standard input: {error.strerror}") from None


def names_in(stream: RawIOBase | BufferedIOBase, null: bool) -> Iterator[str]:
    """Names in a list, one a line or ended by zero bytes, as they come. ValueError: it is no such list."""
    end, held = b"\0" if null else b"\n", b""
    while chunk := stream.read(_CHUNK):
        if not null and b"\0" in chunk:
            raise ValueError("standard input: no list of names, it holds zero bytes; for `find -print0` give --null")
        *whole, held = (held + chunk).split(end)
        if len(held) > LONGEST:
            raise ValueError(f"standard input: no list of names, one is longer than {LONGEST} bytes")
        yield from (os.fsdecode(name) for name in map(partial(_bare, null), whole) if name)
    if name := _bare(null, held):
        yield os.fsdecode(name)


def _bare(null: bool, name: bytes) -> bytes:
    return name if null else name.removesuffix(b"\r")


def file(name: str) -> Named:
    """A file, whatever its suffix."""
    return Named(name, partial(_read, name), Path(name).with_suffix(".txt"))


def _read(name: str) -> bytes:
    """The bytes of a plain file; a pipe or a device would never end."""
    found = os.stat(name)
    if stat.S_ISDIR(found.st_mode):
        raise BadSample("not a file", "it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise BadSample("not a file", "a pipe, a socket or a device")
    if found.st_size > LARGEST:
        raise BadSample("file too large", f"{found.st_size} bytes, at most {LARGEST}")
    return Path(name).read_bytes()


def walk(folder: str) -> Iterator[Named]:
    """The pictures of a folder and those below it, sorted, without hidden ones; a folder that is closed is one bad."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        yield _bad(folder, error)
        return
    for name, is_folder in found:
        if name.startswith("."):
            continue
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk(path)
        elif is_picture(name):
            yield file(path)


def is_picture(name: str) -> bool:
    """By its suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def matching(pattern: str) -> Iterator[Named]:
    """Pictures and shards that match, sorted, without hidden ones; ** stands for any folders, links left out."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root, rest = Path(*parts[:first]), Path(*parts[first:], *(["*"] if parts[-1] == "**" else []))
    for path in sorted(root.glob(str(rest))):
        name = str(path)
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if name.lower().endswith(SHARD):
            yield from tar(name)
        elif is_picture(name) and not os.path.isdir(name):
            yield file(name)


def tar(path: str) -> Iterator[Named]:
    """The pictures of a shard in their order, as TAR/MEMBER; its damage is one bad more. ValueError: none, no tar."""
    return _some(_members(path), f"{path}: no picture in this shard ({_KNOWN})")


def _members(path: str) -> Iterator[Named]:
    damage: list[str] = []
    with open(path, "rb") as shard:
        for name, offset, size in members(shard, path, damage):
            if is_picture(name):
                yield Named(f"{path}/{name}", partial(_part, path, offset, size))
    if damage:
        yield _bad(path, BadSample("damaged shard", damage[0].removeprefix(f"{path}: ")))


def _part(path: str, offset: int, size: int) -> bytes:
    if size > LARGEST:
        raise BadSample("member too large", f"{size} bytes, at most {LARGEST}")
    with open(path, "rb") as shard:
        shard.seek(offset)
        return shard.read(size)


def sent(address: str) -> bytes:
    """What a server gives for an address. BadSample: nothing, or more than LARGEST_SENT bytes."""
    try:
        with fetch.ask(address) as answer:
            if (answer.length or 0) > LARGEST_SENT:
                raise BadSample("file too large", f"{answer.length} bytes, at most {LARGEST_SENT}")
            data = b"".join(islice(answer.chunks, LARGEST_SENT // fetch.CHUNK + 1))
    except (fetch.Final, OSError, HTTPException) as error:
        what = str(error) if isinstance(error, fetch.Final) else fetch.reason(error)
        raise BadSample("cannot be fetched", what) from None
    if len(data) > LARGEST_SENT:
        raise BadSample("file too large", f"more than {LARGEST_SENT} bytes")
    if answer.length not in (None, len(data)):
        raise BadSample("cannot be fetched", f"{len(data)} of {answer.length} bytes came")
    return data


def _bad(name: str, error: BadSample | OSError) -> Named:
    def read() -> bytes:
        raise error

    return Named(name, read)
