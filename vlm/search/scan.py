"""Which pictures are in folders: links followed, each folder looked at once, hidden ones left out."""

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vlm.data.pictures import PICTURES
from vlm.search.manifest import YOUNG, Found

SUFFIXES = tuple(f".{suffix}".encode() for suffix in PICTURES.split(";"))
SETTLED = 2 * 10**9  # nanoseconds: a file this new may change again without a new time (FAT counts in two seconds)

_Place = tuple[int, int]  # device and inode


@dataclass
class Scan:
    """A walk over folders. `told` hears what cannot be looked at: folder, path in it, why, whether it is a folder."""

    told: Callable[[int, bytes, str, bool], None]
    hidden: bool = False
    been: set[_Place] = field(default_factory=set)  # folders not to enter (again): links may lead in circles

    def leave_out(self, folder: bytes) -> None:
        """The index itself."""
        self.been.add(_place(os.stat(folder)))

    def pictures(self, number: int, root: bytes) -> Iterator[Found]:
        """The pictures below folder `number`, at `root`, in order of names."""
        now = time.time_ns()
        waiting = [b""]
        while waiting:
            below = waiting.pop()
            inside = list[bytes]()
            for entry in self._entries(number, root, below):
                path = os.path.join(below, entry.name)
                looks = entry.name.lower().endswith(SUFFIXES)
                try:
                    if entry.is_dir():
                        inside.append(path)
                    elif looks:
                        yield _found(number, path, entry.stat(), now)
                except OSError as error:
                    if looks:
                        self.told(number, path, str(error.strerror), False)
            waiting += reversed(inside)

    def _entries(self, number: int, root: bytes, below: bytes) -> list["os.DirEntry[bytes]"]:
        path = os.path.join(root, below) if below else root
        try:
            place = _place(os.stat(path))
            if place in self.been:
                return []
            self.been.add(place)
            with os.scandir(path) as entries:
                shown = [entry for entry in entries if self.hidden or not entry.name.startswith(b".")]
        except OSError as error:
            self.told(number, below, str(error.strerror), True)
            return []
        return sorted(shown, key=lambda entry: entry.name)


def _found(number: int, path: bytes, seen: os.stat_result, now: int) -> Found:
    if not stat.S_ISREG(seen.st_mode):
        raise OSError(errno.EINVAL, "not a file")
    changed = seen.st_mtime_ns
    return Found(number, path, seen.st_size, YOUNG if changed > now - SETTLED else changed)


def _place(found: os.stat_result) -> _Place:
    return found.st_dev, found.st_ino
