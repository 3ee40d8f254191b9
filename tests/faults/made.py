"""Hand-made tars with one fault each, and what the shard doctor and the training index say of them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.check import Patience, check
from vlm.data.image import BadSample, decode
from vlm.data.record import Record
from vlm.data.shards import Shards

Member = tuple[str, bytes] | tarfile.TarInfo


def encoded(colour: Any, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    """A picture of one colour."""
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, kind, **options)
    return out.getvalue()


def good(count: int = 2) -> list[Member]:
    """Whole samples, no two alike."""
    found: list[Member] = []
    for i in range(count):
        found += [(f"k{i}.png", encoded((i, 9, 9))), (f"k{i}.txt", f"number {i}".encode())]
    return found


def tar(path: Path, members: Sequence[Member]) -> Path:
    """A tar of members as they are."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            out.addfile(info, io.BytesIO(member[1]))
    return path


Counts = tuple[int, dict[str, int], dict[str, int]]


def counted(*files: Path, patience: Patience | None = None, workers: int = 0) -> Counts:
    """Samples, errors and notes of the doctor."""
    report = check(files, Record("jpg;png;jpeg;webp", "txt;json:caption"), patience or Patience(), workers)
    return report.samples, {e.reason: e.count for e in report.errors}, {n.reason: n.count for n in report.notes}


def trained(*files: Path) -> dict[str, int]:
    """What training counts: in the index, and while reading."""
    shards = Shards([str(file) for file in files], max_bad_fraction=1.0)
    bad = dict(shards.bad)
    for index in range(len(shards)):
        try:
            decode(shards.raw(index).image)
        except BadSample as error:
            bad[error.reason] = bad.get(error.reason, 0) + 1
    return bad
