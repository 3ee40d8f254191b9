"""Small shards, made with webdataset's own writer."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image


def picture(seed: int, size: int = 8) -> bytes:
    """A random PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """One shard; each sample is `__key__` and members by suffix (bytes, text, or an object for json)."""
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(dict(sample))
    return path


def numbered(first: int, count: int) -> list[dict[str, Any]]:
    """Samples k00000, … with a PNG, two captions of their own and a shared one in json."""
    return [
        {
            "__key__": f"k{i:05d}",
            "png": picture(i),
            "json": {"caption": [f"number {i}", f"the {i}th thing", "a thing"], "kind": f"kind {i // 2}"},
        }
        for i in range(first, first + count)
    ]
