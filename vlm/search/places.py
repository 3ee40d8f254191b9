"""How an index remembers its folders: from its own place where both lie together, so that they can move together."""

import os
from pathlib import Path


def remembered(folder: Path, index: Path) -> bytes:
    """From the index if that is inside the folder, or if both are in one folder; else the whole path."""
    real, own = os.path.realpath(folder), os.path.realpath(index)
    together = own.startswith(os.path.join(real, "")) or real.startswith(os.path.join(os.path.dirname(own), ""))
    return os.fsencode(os.path.relpath(real, own) if together else real)


def place_of(path: bytes, index: Path) -> bytes:
    """Where a remembered folder is now."""
    return os.path.normpath(os.path.join(os.fsencode(os.path.realpath(index)), path))


def as_told(path: bytes) -> bytes:
    """A path as a user would write it: from the working directory for what lies below it, else whole.

    One that begins with a dash would be an option to the next command.
    """
    here = os.path.join(os.fsencode(os.getcwd()), b"")
    told = path[len(here) :] if path.startswith(here) else path
    return b"./" + told if told.startswith(b"-") else told
