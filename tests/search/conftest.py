"""Tiny runs that have learned eight colours, and folders of pictures old enough for their times to be trusted."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.tiny import COLOURS, learned, picture, rate, tiny_run
from vlm.train.run import train_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip`, `decoder` (no contrastive head), `other` (as clip, untrained)."""
    folder = tmp_path_factory.mktemp("runs")
    learned(folder, "clip")
    train_run(tiny_run(folder, "decoder", "train.steps=1"), folder / "decoder")
    train_run(tiny_run(folder, "clip", "train.steps=1"), folder / "other")
    return folder


@pytest.fixture(scope="session")
def qformer(runs: Path) -> Path:
    """A run with four vectors a picture and a matching head."""
    frozen = ("model.vision.frozen=true", f"model.init.vision={runs / 'clip'}", rate(2e-2))
    given = ("train.batch_size=16", "train.steps=40", "model.connector.queries=4")
    train_run(tiny_run(runs, "qformer", *frozen, *given), runs / "qformer")
    return runs / "qformer"


def write(folder: Path, files: Mapping[str, bytes], age: float = 100.0) -> Path:
    """Files of a folder, last changed some seconds ago."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A picture of each colour, two of them in a folder below, and a file that is none."""
    found = {f"{'more/' if i > 5 else ''}{colour}.png": picture(colour) for i, colour in enumerate(COLOURS)}
    return write(tmp_path / "pictures", {**found, "notes.txt": b"no picture"})


Put = Callable[..., Path]


@pytest.fixture(scope="session")
def put() -> Put:
    """`write` for tests."""
    return write
