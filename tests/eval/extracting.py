"""Features of a few squares by a model of noise: what several test files of `vlm.eval.features` need."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm import build_data
from vlm.data.loader import Loader
from vlm.eval.features import Features
from vlm.restore import Ready

SAMPLES = 22
BPE = {"kind": "bpe", "vocab": 280}
PARTS = {f"part-0000{n}.safetensors" for n in range(3)}


def loader(ready: Ready, shard: Path, **settings: Any) -> Loader:
    data = ready.data.model_copy(update={"max_bad_fraction": 0.5, **settings})
    source = build_data.shards(data, str(shard))
    transform = build_data.transform(ready.vision, ready.model, source)
    return build_data.evaluation_loader(data, source, transform, ready.tokenizer, ready.batch_size)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Encoded:
    """Counts the pictures that a model encodes, and stops it before the batch of this number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready: Ready, stop: int = 1000) -> None:
        self.pictures, self._batches, encode = 0, 0, ready.model.encode

        def counted(images: torch.Tensor) -> torch.Tensor:
            if self._batches == stop:
                raise KeyboardInterrupt
            self._batches += 1
            self.pictures += len(images)
            return encode(images)

        monkeypatch.setattr(ready.model, "encode", counted)


def equal(left: Features, right: Features) -> None:
    for name in ("image", "text", "image_ids", "text_ids", "owner", "places"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert (list(left.names), list(left.strings)) == (list(right.names), list(right.strings))
    assert [row.tolist() for row in map(left.words.__getitem__, range(len(left.words)))] == [
        row.tolist() for row in map(right.words.__getitem__, range(len(right.words)))
    ]
    assert left.made_of == right.made_of
