"""Pictures that arrive in a folder."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from vlm.captioning.inputs import Named, file, is_picture

INTERVAL = 0.5  # seconds between two looks
Stamp = tuple[int, int, int]  # size, time of change in nanoseconds, inode


@contextmanager
def ended_by_term() -> Iterator[None]:
    """Inside, SIGTERM ends as Ctrl-C does: a service that is stopped has done its work."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def arrivals(folder: str, stop: Event, all_of_them: bool = False) -> Iterator[Named]:
    """Pictures that are new in a folder or below it, or were changed, once they are complete; until `stop` is set.

    Complete is what has the same size and time at two looks: a file under another name until it is whole (rename), and
    one that is written slowly. `all_of_them`: those too that are there already. FileNotFoundError: the folder is gone.
    """
    # Looked at now, not when the first is asked for: what arrives until then is new.
    return _arrivals(folder, stop, {} if all_of_them else dict(_looked(folder)))


def _arrivals(folder: str, stop: Event, told: dict[str, Stamp]) -> Iterator[Named]:
    waiting: dict[str, Stamp] = {}
    while not stop.is_set():
        now = dict(_looked(folder))
        complete = [path for path, stamp in now.items() if waiting.get(path) == stamp != told.get(path) and stamp[0]]
        told = {path: stamp for path, stamp in told.items() if path in now} | {path: now[path] for path in complete}
        waiting = {path: stamp for path, stamp in now.items() if told.get(path) != stamp}
        yield from map(file, complete)
        stop.wait(INTERVAL)


def _looked(folder: str, top: bool = True) -> Iterator[tuple[str, Stamp]]:
    """Path and stamp of each picture, sorted."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if top:
            raise OSError(f"{folder}: {error.strerror}") from None  # it was there when all began
        return  # closed, or gone since it was seen
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _looked(entry.path, top=False)
        elif is_picture(entry.name) and (stamp := _stamp(entry)) is not None:
            yield entry.path, stamp


def _stamp(entry: "os.DirEntry[str]") -> Stamp | None:
    try:
        found = entry.stat()
    except OSError:  # gone since it was seen
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
