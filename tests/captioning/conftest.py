"""Runs that write captions, and pictures for them."""

from pathlib import Path

import pytest

from tests.tiny import COLOURS, picture, tiny_run
from vlm.train.run import train_run


def rate(value: float) -> str:
    return f"train.params=[{{match: '.*', lr: {value}}}]"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have learned eight colours, and a picture of each."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("train.batch_size=16", "train.log_every=60", "train.warmup=10", "data.cache_mb=8")
    train_run(tiny_run(folder, "clip", *common, "train.steps=60", rate(5e-3)), folder / "clip")
    frozen = ("model.vision.frozen=true", f"model.init.vision={folder / 'clip'}", rate(2e-2))
    train_run(
        tiny_run(folder, "qformer", *common, *frozen, "train.steps=120", "model.connector.queries=4"),
        folder / "qformer",
    )
    train_run(tiny_run(folder, "decoder", *common, *frozen, "train.steps=60"), folder / "decoder")
    pictures(folder / "pictures")
    return folder


def pictures(folder: Path) -> Path:
    """Eight squares, two of them in a folder below."""
    (folder / "more").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        (folder / ("more" if i > 5 else "") / f"{colour}.png").write_bytes(picture(colour))
    (folder / "notes.txt").write_text("no picture")
    return folder
