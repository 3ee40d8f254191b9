"""Tar shards by address: http(s) with the standard library, object stores with fsspec, commands where allowed.

A shard is fetched whole into the cache when it is first needed, and read from there.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from time import sleep
from typing import BinaryIO

from braceexpand import braceexpand

from vlm.data import fetch
from vlm.data.cache import DIGEST, TAG, Cache, alone, used
from vlm.data.fetch import Final, Listed

TRIES, PAUSE = 4, 1.0  # of a download; seconds before the second one, doubled before each further one

Stamp = tuple[int, int]  # bytes, and the time of change of a local file or the first digits of another's sha256
_pipes: ContextVar[bool] = ContextVar("pipes", default=False)


@contextmanager
def allow_pipes() -> Iterator[None]:
    """Inside, addresses pipe:COMMAND are run in a shell: what a person allows on the command line, never a config."""
    token = _pipes.set(True)
    try:
        yield
    finally:
        _pipes.reset(token)


@dataclass(frozen=True)
class Remote:
    """A shard that is not on this disk, or not yet. `listed`: bytes and sha256 by the index.json beside it, if any.

    An address is taken to stand for the same bytes for good, unless index.json lists another sum.
    """

    address: str
    cache: Cache = field(compare=False)
    listed: Listed | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return fetch.shown(self.address)

    @property
    def tag(self) -> str:
        """Names it in the cache. What a command gives may depend on the folder it runs in."""
        where = os.getcwd() if self.address.startswith(fetch.PIPE) else ""
        return hashlib.sha256(f"{where}\0{self.address}".encode("utf-8", "surrogateescape")).hexdigest()[:TAG]

    def kept(self, stamp: Stamp | None = None) -> Path | None:
        """The copy in the cache: of that content, if it is known."""
        if stamp is None and self.listed is not None:
            stamp = self.listed.bytes, int(self.listed.sha256[:DIGEST], 16)
        name = "*" if stamp is None else f"{stamp[1]:0{DIGEST}x}"
        return next((self.cache.folder / self.tag).glob(f"{name}.tar"), None)

    def fetch(self, stamp: Stamp | None = None) -> Path:
        """The copy in the cache, after a download unless another process was faster. ValueError when it fails."""
        folder = self.cache.folder / self.tag
        with alone(folder / "draft.part") as file:
            if (there := self.kept(stamp)) is not None:
                return there
            draft = _Draft(file, self)
            self._download(draft)
            os.fsync(file.fileno())
            path = folder / f"{draft.sha.hexdigest()[:DIGEST]}.tar"
            for old in folder.glob("*.tar"):
                old.unlink(missing_ok=True)
            (folder / "draft.part").replace(path)
        return path

    def _download(self, draft: "_Draft") -> None:
        for attempt in range(TRIES):
            try:
                return self._try(draft)
            except (OSError, HTTPException) as error:
                if attempt == TRIES - 1:
                    raise ValueError(
                        f"{self}: {fetch.reason(error)}; tried {TRIES} times. Try again later, or download the shards "
                        "and name the files"
                    ) from None
            except Final as error:
                raise ValueError(f"{self}: {error}") from None
            sleep(PAUSE * 2**attempt)

    def _try(self, draft: "_Draft") -> None:
        with fetch.ask(self.address, draft.size, draft.version) as answer:
            if answer.start != draft.size or answer.version != draft.version:
                draft.clear(answer.version)
            if answer.start != draft.size:
                raise ConnectionError("it became another one meanwhile")
            self.cache.make_room((answer.length or 0) - draft.size, str(self))
            for chunk in answer.chunks:
                draft.write(chunk)
        if answer.length not in (None, draft.size):
            raise ConnectionError(f"{draft.size} of {answer.length} bytes came")
        if self.listed is not None and self.listed != (draft.size, draft.sha.hexdigest()):
            found = f"{draft.size} bytes with sha256 {draft.sha.hexdigest()}"
            draft.clear()
            raise ConnectionError(f"{found} came, and index.json beside it lists {self.listed[0]}, {self.listed[1]}")
        draft.check()


class _Draft:
    """What has come so far of a shard."""

    def __init__(self, file: BinaryIO, remote: Remote) -> None:
        self._file, self._remote = file, remote
        self.clear()

    def clear(self, version: str = "") -> None:
        """Begin anew, with what the server calls this state of the file."""
        self._file.truncate(0)
        self.size, self.sha, self.version = 0, hashlib.sha256(), version

    def write(self, data: bytes) -> None:
        """Add the next bytes. Final: they do not fit."""
        cache = self._remote.cache
        self.size += len(data)
        if self.size > cache.bytes:
            raise Final(f"is larger than the whole cache may be; raise data.shard_cache_gb={cache.gb:g}")
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise Final(f"{error.strerror}: {cache.folder}; set data.shard_cache to another disk") from None
        self.sha.update(data)

    def check(self) -> None:
        """Final: no tar begins like this."""
        self._file.seek(0)
        start = self._file.read(tarfile.BLOCKSIZE)
        try:
            if start != bytes(tarfile.BLOCKSIZE):  # the end of an empty archive
                tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise Final(f"what comes is no plain tar file; it begins with {start[:16]!r}") from None


Place = Path | Remote


def opened(place: Place, stamp: Stamp | None = None) -> tuple[BinaryIO, Stamp]:
    """A shard, open to read, and its stamp. `stamp`: the content that was met before, if any; it may be another now."""
    if isinstance(place, Path):
        handle = place.open("rb")
        stat = os.fstat(handle.fileno())
        return handle, (stat.st_size, stat.st_mtime_ns)
    while True:
        path = place.kept(stamp) or place.fetch(stamp)
        try:
            handle = path.open("rb")
        except FileNotFoundError:  # another process made room
            continue
        used(path)
        return handle, (os.fstat(handle.fileno()).st_size, int(path.stem, 16))


def at_hand(place: Place) -> bool:
    """Whether it can be read without a download."""
    return isinstance(place, Path) or place.kept() is not None


def find(pattern: str, cache: Cache) -> list[Remote]:
    """Shards of an address with braces {000..009}; in object stores also with * or of a folder.

    ValueError: no address of shards, nothing there, a command that is not allowed, a missing package.
    """
    if pattern.startswith(fetch.PIPE):
        if not _pipes.get():
            raise ValueError(
                f"shards {pattern!r}: this would run a command in a shell; where that is meant, allow it with the flag "
                "--allow-pipe (no config can)"
            )
        return [Remote(name, cache) for name in braceexpand(pattern)]
    names = [name for given in braceexpand(pattern) for name in fetch.names(given)]
    lists = {folder: fetch.listing(folder) for folder in dict.fromkeys(map(fetch.folder, names))}
    return [Remote(name, cache, lists[fetch.folder(name)].get(fetch.file(name))) for name in names]
