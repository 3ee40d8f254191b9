"""One job for each run folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.data.cache import still_there

LOCK = ".lock"


@contextmanager
def locked(folder: Path, remedy: str = "wait for it, stop it, or choose another --out") -> Iterator[None]:
    """The folder is this process's alone inside; it is made if need be, and goes again if nothing was put into it.

    The system drops the lock of a process that dies, however it dies, so a lock file that was left behind refuses
    nobody. Workers that outlive a killed process do not hold it: such locks are not inherited.
    Errors: another process that is alive has it; the message ends with the `remedy`.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        handle = _acquire(path, remedy)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)
    finally:
        for new in made:
            if any(new.iterdir()):
                break
            new.rmdir()


def _acquire(path: Path, remedy: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
            raise ValueError(
                f"{path.parent} is in use by another job (process {owner or 'unknown'}): {remedy}"
            ) from None
        if still_there(path, handle):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)  # its last owner removed it between our opening and our locking
