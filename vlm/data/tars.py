"""Tar files that are the same bytes for the same samples, keys that fit in, a folder that is whole or not there."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset

INDEX, SIZES = "index.json", "sizes.json"  # beside the tars
MAX_NAME = 80  # characters of a key; a member of a plain tar has room for a hundred


class Names:
    """Keys of samples in shards: safe characters, no dots, none twice; numbers for what would be empty or repeated.

    In memory are eight bytes a sample.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        """`keys`: of all samples, in order."""
        digests = np.fromiter((_digest(safe(key)) for key in keys), np.uint64)
        self._all, counts = np.unique(digests, return_counts=True)
        self._repeated = self._all[counts > 1]

    def __call__(self, index: int, key: str) -> str:
        """The name of a sample."""
        name = safe(key)
        if not name.strip("_"):
            name = f"{index:08d}"
        elif not _holds(self._repeated, name):
            return name
        else:
            name = f"{name}-{index:08d}"
        while _holds(self._all, name):
            name += "-"
        return name


def safe(key: str) -> str:
    """Letters, digits, - and _; anything else becomes _, folders included."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:MAX_NAME]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _holds(digests: npt.NDArray[np.uint64], name: str) -> bool:
    place = int(np.searchsorted(digests, np.uint64(_digest(name))))
    return place < len(digests) and int(digests[place]) == _digest(name)


@dataclass
class Shard:
    """A finished tar."""

    file: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""


class _Hashed:
    """A new file, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file, self._sha, self.size = path.open("xb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> str:
        """On the disk for good; the sum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha.hexdigest()


@dataclass
class Tars:
    """Tars 000000.tar, 000001.tar, … in a folder; the same samples give the same bytes, whoever writes them when."""

    folder: Path
    samples: int
    max_bytes: int
    written: list[Shard] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file: _Hashed | None = None
        self._tar: Any = None

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """One more sample, in a new shard where it would not fit."""
        room = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
        full = self._file is not None and (
            self.written[-1].samples >= self.samples or self._file.size + room > self.max_bytes
        )
        if full:
            self.close()
        if self._file is None:
            self.written.append(Shard(f"{len(self.written):06d}.tar"))
            self._file = _Hashed(self.folder / self.written[-1].file)
            self._tar = webdataset.TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        self._tar.write({"__key__": key, **members})
        self.written[-1].samples += 1

    def close(self) -> None:
        """Finish the shard that is open."""
        if self._file is not None:
            self._tar.close()
            self.written[-1].sha256, self.written[-1].bytes = self._file.close(), self._file.size
            self._file = None


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Writes index.json, and sizes.json out of its `shards`, on the disk for good."""
    sizes = {shard["file"]: shard["samples"] for shard in index["shards"]}
    for name, content in ((SIZES, sizes), (INDEX, index)):
        with (folder / name).open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_out(out: Path, overwrite: bool, sources: Sequence[str] = ()) -> None:
    """Refuses a folder that is not ours to replace, before any work. Changes nothing."""
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"{out}: is a file; shards are written into a folder of their own")
        if strange := sorted({file.name for file in out.iterdir()} - _written(out)):
            raise ValueError(
                f"{out}: holds {strange[0]}, which `vlm shards write` has not written; choose another folder"
            )
        if not overwrite and any(out.iterdir()):
            raise ValueError(f"{out}: exists already; choose another folder, or --overwrite it")
    for name in sources:
        path = Path(name).expanduser().resolve()
        if out.resolve() in (path, *path.parents) or (path.is_dir() and path in out.resolve().parents):
            raise ValueError(f"{out}: and the source {name} lie in each other; write to a folder beside it")


def _written(out: Path) -> set[str]:
    """The files that the index of a finished folder names."""
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        return {INDEX, SIZES, *(str(shard["file"]) for shard in index["shards"])}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


@contextmanager
def drafted(out: Path, overwrite: bool, check: Callable[[Path, bool], None] | None = None) -> Iterator[Path]:
    """A hidden folder beside `out`, which becomes `out` at the end; locked while it is filled, gone after an error.

    `check`: refuses an `out` that is not to be replaced, `check_out` unless given. Errors: as of it; another process
    fills it.
    """
    check = check_out if check is None else check
    check(out, overwrite)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    draft, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old")
    draft.mkdir(exist_ok=True)
    with (draft / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another process is writing it now") from None
        try:
            if old.exists() and not out.exists():  # killed between the two steps of replacing it
                old.replace(out)
                check(out, overwrite)
            for left in draft.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != ".lock":
                    left.unlink()
            yield draft
            _publish(draft, out, old)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, out: Path, old: Path) -> None:
    """Gives the draft its name; what had it before goes last."""
    shutil.rmtree(old, ignore_errors=True)
    (draft / ".lock").unlink()
    if out.exists():
        out.replace(old)
    draft.replace(out)
    shutil.rmtree(old, ignore_errors=True)
