"""Features in a folder: parts of some hundred samples, each whole or not there, taken up again where they still fit.

manifest.json tells what made them. part-00000.safetensors holds vectors, ids and names; tokens-00000.safetensors what
the image encoder gave, which only ITM asks for, and is therefore mapped, not read.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.data.cache import alone
from vlm.eval.origin import Origin
from vlm.model.weights.files import fingerprint

MANIFEST, LOCK = "manifest.json", ".lock"
_FACTS = "facts"
_FORMAT = 1  # another number whenever the same model and data would give other files
_OURS = ("part-*.safetensors", "tokens-*.safetensors")
_DRAFTS = ("part-*.tmp", "tokens-*.tmp", "manifest.tmp")  # what a killed run leaves

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Features of neighbouring samples.

    `data`: the sum of all samples up to its last; `seen`, `bad`: as of a loader.
    """

    tensors: Mapping[str, Tensor]
    tokens: Tensor | None
    data: str
    seen: int
    bad: Counter[str]


class FeatureFolder:
    """The parts in a folder that nobody else writes meanwhile: see `opened`."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self._folder, self._origin = folder, origin

    def find(self, number: int, data: str, tokens: bool) -> Part | None:
        """A part that was made of the same data; None: it is to be made. `tokens`: with what ITM needs."""
        path, beside = self._path("part", number), self._path("tokens", number)
        if not path.is_file() or (tokens and not beside.is_file()):
            return None
        try:
            tensors, facts = _read(path)
            if facts["origin"] != self._origin.tag or facts["data"] != data:
                return None
            if facts["sum"] != fingerprint(tensors, tensors.keys()):
                raise ValueError("other bytes than were written")
            found = _mapped(beside) if tokens else None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: damaged (%s); this part is made anew", path, error)
            return None
        return Part(tensors, found, data, facts["seen"], Counter(facts["bad"]))

    def add(self, number: int, part: Part, left: int) -> Part:
        """Keeps a part; its tokens come back mapped. `left`: samples that are to follow. Errors: the disk is full."""
        if number == 0:
            self._room(part, left)
        path, beside = self._path("part", number), self._path("tokens", number)
        path.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
        if part.tokens is not None:
            _write(beside, {"tokens": part.tokens}, {})
        facts = {
            "origin": self._origin.tag,
            "data": part.data,
            "seen": part.seen,
            "bad": part.bad,
            "sum": fingerprint(part.tensors, part.tensors.keys()),
        }
        _write(path, part.tensors, facts)
        return part if part.tokens is None else replace(part, tokens=_mapped(beside))

    def drop_after(self, parts: int) -> None:
        """Removes what was made of more samples than there are now."""
        for name in ("part", "tokens"):
            for path in self._folder.glob(f"{name}-*.safetensors"):
                if int(path.stem.rpartition("-")[2]) >= parts:
                    path.unlink()

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f"{name}-{number:05d}.safetensors"

    def _room(self, part: Part, left: int) -> None:
        kept = [*part.tensors.values(), *([] if part.tokens is None else [part.tokens])]
        size = sum(tensor.nbytes for tensor in kept)
        need, free = size + size * left // max(1, part.seen), shutil.disk_usage(self._folder).free
        if need > free:
            raise ValueError(
                f"{self._folder}: features of {part.seen + left} samples take {need / 2**30:.1f} GiB, and only "
                f"{free / 2**30:.1f} are free; name a folder on another disk"
            )


@contextmanager
def opened(folder: Path, origin: Origin) -> Iterator[FeatureFolder]:
    """The folder, ready for features of this origin; those of another are removed, and that is said.

    ValueError: it holds something else, or is a file.
    """
    refuse_strange(folder)
    with alone(folder / LOCK, "another process makes features there; waiting for it"):
        for path in _found(folder, _DRAFTS):
            path.unlink()
        before = _manifest(folder)
        now = {"format": _FORMAT, "made_by": asdict(origin)}
        if before != now:
            if stale := _found(folder, _OURS):
                made = before.get("made_by") if isinstance(before, dict) else None
                points = origin.others(made if isinstance(made, dict) else {})
                log.warning("%s: features of another origin (%s); made anew", folder, ", ".join(points) or "format")
            for path in stale:
                path.unlink()
            _replace(folder / MANIFEST, json.dumps(now, indent=1).encode() + b"\n")
        yield FeatureFolder(folder, origin)


def refuse_strange(folder: Path) -> None:
    """ValueError: a folder in which features would be mixed with something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; features are kept in a folder of their own")
    ours = {path.name for path in _found(folder, _OURS + _DRAFTS)} | {MANIFEST, LOCK}
    if strange := sorted({path.name for path in folder.iterdir()} - ours):
        raise ValueError(f"{folder}: holds {strange[0]}, which is no part of features; choose another folder")


def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _manifest(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
        return tensors, json.loads(file.metadata()[_FACTS])


def _mapped(path: Path) -> Tensor:
    """Of the file, which the system reads where it is looked at, and may forget again."""
    with safe_open(path, "pt") as file:
        tokens: Tensor = file.get_tensor("tokens")
        return tokens


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Whole or not at all. The facts are one entry of the header: the order of several would differ between runs."""
    draft = path.with_suffix(".tmp")
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft, {_FACTS: json.dumps(facts)}
        )
        _settle(draft, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}; the parts before it are whole") from None
    finally:
        draft.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_bytes(content)
    _settle(draft, path)


def _settle(draft: Path, path: Path) -> None:
    """Gives a draft its name once it is on the disk."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
