"""What the loader asks of a set of pictures, what a source of any format gives for it, reading inside one folder."""

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlm.data.image import BadSample
from vlm.data.plan import Indices
from vlm.data.record import MAX_BYTES
from vlm.data.remote import Place
from vlm.data.shards import RawSample
from vlm.data.talk import Talk

PICTURES = "jpg;jpeg;png;webp;gif;bmp;tif;tiff"  # suffixes


@runtime_checkable
class Pictures(Protocol):
    """Random access to samples: tar shards (`Shards`) and everything else that can be read (`Source`)."""

    bad: Counter[str]  # what was left out when it was opened, by reason
    max_bad_fraction: float

    @property
    def files(self) -> Sequence[Place]:
        """What it is read from."""
        ...

    @property
    def starts(self) -> Indices:
        """The first sample of each file, or of each block where samples are files: what is read together."""
        ...

    def __len__(self) -> int:
        """Samples that may be asked for."""
        ...

    def key(self, index: int) -> str:
        """Name of a sample."""
        ...

    def where(self, index: int) -> str:
        """File and place of a sample, for messages."""
        ...

    def raw(self, index: int) -> RawSample:
        """Read one sample. BadSample when it cannot be used; ValueError when the files have changed."""
        ...

    def captions(self) -> Iterator[str]:
        """All captions of all usable samples, in order; pictures are not read."""
        ...


@dataclass(frozen=True)
class Record:
    """What a source says about a picture: where it is (or its bytes), its captions as found, further fields.

    Records of equal `id` show the same picture. A talk may have `more` pictures, or none: `image` is empty then.
    """

    key: str
    id: str
    image: str | bytes
    captions: list[Any]
    fields: dict[str, Any]
    more: tuple[str | bytes, ...] = ()
    talk: Talk | None = None


@runtime_checkable
class Records(Protocol):
    """The records of a source by number, in a fixed order; at most a few are in memory at a time."""

    files: list[Path]
    bad: Counter[str]  # what names no picture or cannot be read, by reason
    seen: int  # rows or files that were looked at
    about: str  # format and keys in words, for people

    def __len__(self) -> int:
        """Records that name a picture."""
        ...

    def __getitem__(self, index: int) -> Record:
        """One record. BadSample when it says nothing usable; ValueError when the files have changed."""
        ...

    def where(self, index: int) -> str:
        """File and row, for messages."""
        ...


class Folder:
    """A folder whose files may be read, and nothing outside of it, whatever `..` and links say."""

    def __init__(self, path: Path) -> None:
        """ValueError when it is no folder."""
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder; pictures are looked for there (--images, data.images)")
        self.path = path
        self._real = os.path.realpath(path)

    def read(self, name: str) -> bytes:
        """The content of a file by its path relative to the folder (an absolute one must lead into it). BadSample."""
        if "://" in name:
            raise BadSample("picture is an address", f"{name}: only files are read; img2dataset downloads addresses")
        try:
            real = os.path.realpath(os.path.join(self._real, name))
            if os.path.commonpath([real, self._real]) != self._real:
                raise BadSample("picture outside the folder", f"{name} leads out of {self.path}")
            found = os.stat(real)
            if not stat.S_ISREG(found.st_mode):
                raise BadSample("no such picture", f"{name} in {self.path} is not a file")
            if found.st_size > MAX_BYTES:
                raise BadSample("member too large", f"{name}: {found.st_size} bytes, at most {MAX_BYTES}")
            return Path(real).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BadSample("no such picture", f"{name} in {self.path}") from None
        except (OSError, ValueError) as error:  # no permission; a name that no file can have
            raise BadSample("unreadable picture", f"{name!r}: {error}") from None


def picture_id(name: str) -> str:
    """A picture's path in one spelling: no ./, no double slash."""
    return posixpath.normpath(name.strip())


def picture_key(name: str) -> str:
    """The path without its suffix and leading slash: `a/0001.jpg` is sample `a/0001`."""
    return posixpath.splitext(picture_id(name))[0].lstrip("/")
