"""A folder of files that can be fetched or made again: each whole or not there, made by one process, bounded in all."""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

HEX = "[0-9a-f]"
TAG, DIGEST = 20, 15  # hexadecimal digits: of an address or a key; of a content, so that they fit into 63 bits
_OURS = (f"{HEX * TAG}/{HEX * DIGEST}.tar", f"index/{HEX * TAG}.index", f"{HEX * TAG}/*.part", "index/*.part")
_ABANDONED = 86_400  # seconds without a byte, after which a draft is one that a killed process left

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """$VLM_CACHE, or ~/.cache/vlm/shards."""
    return Path(os.path.expanduser(os.environ.get("VLM_CACHE") or "~/.cache/vlm/shards"))


@dataclass(frozen=True)
class Cache:
    """Where shards by address and the indices of all shards are kept, and how much of them, in GiB.

    Other files in the folder are left alone.
    """

    folder: Path = field(default_factory=default_folder)
    gb: float = 100.0

    @property
    def bytes(self) -> int:
        """The bound."""
        return int(self.gb * 2**30)

    def make_room(self, need: int, what: str) -> None:
        """Drops what was not used for longest, until `need` bytes more are within the bound and fit on the disk.

        A file that is open stays readable to who has it open. ValueError, naming `what`, when there cannot be room.
        """
        if need > self.bytes:
            raise ValueError(
                f"{what}: {need / 2**30:.3g} GB are more than the cache may hold; raise data.shard_cache_gb={self.gb:g}"
            )
        kept = sorted((stat.st_mtime, stat.st_size, path) for path, stat in self._files())
        used = sum(size for _, size, _ in kept)
        for touched, size, path in kept:
            if used + need <= self.bytes and need < shutil.disk_usage(self.folder).free:
                return
            if path.suffix != ".part" or touched < time.time() - _ABANDONED:
                path.unlink(missing_ok=True)
                used -= size
        if need >= shutil.disk_usage(self.folder).free:
            raise ValueError(f"{what}: {self.folder} has no room for {need / 2**30:.3g} GB; set data.shard_cache")

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for pattern in _OURS:
            for path in self.folder.glob(pattern):
                with suppress(FileNotFoundError):  # another process made room
                    yield path, path.stat()


def used(path: Path) -> None:
    """Notes that a file is in use; a cache that may only be read keeps no such notes."""
    with suppress(OSError):
        if path.stat().st_mtime < time.time() - 60:
            os.utime(path)


@contextmanager
def alone(draft: Path, waiting: str = "") -> Iterator[BinaryIO]:
    """An empty file that no other process writes meanwhile: rename it inside, or it goes again.

    Waits for who has it, and says so in the words of `waiting`. The system drops the lock of a process that dies; what
    it left is begun anew.
    """
    draft.parent.mkdir(parents=True, exist_ok=True)
    with _locked(draft, waiting) as handle:
        try:
            handle.truncate(0)
            yield handle
        finally:
            if still_there(draft, handle.fileno()):
                draft.unlink()


def _locked(draft: Path, waiting: str) -> BinaryIO:
    while True:
        handle = draft.open("a+b")
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    log.warning("%s: %s", draft, waiting)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if still_there(draft, handle.fileno()):
                return handle
        except OSError as error:
            handle.close()
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(draft)) from None
        handle.close()  # its last owner renamed it between our opening and our locking


def still_there(path: Path, handle: int) -> bool:
    """Whether an open file has that name yet."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
