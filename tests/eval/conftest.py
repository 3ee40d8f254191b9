"""An evaluation of two small runs, and a model of noise with data: for the tests of `vlm evaluate` and of features."""

from pathlib import Path

import pytest

from tests.eval.extracting import BPE, SAMPLES
from tests.eval.noisy import noisy
from tests.tiny import members, pack, squares, tiny_run
from vlm.eval.run import evaluate
from vlm.eval.tasks import Request
from vlm.restore import Ready
from vlm.train.run import train_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps, data of 12 pictures, other data, and an evaluation of each run."""
    place = tmp_path_factory.mktemp("evaluate")
    for kind in ("clip", "qformer", "decoder"):
        train_run(tiny_run(place, kind, "train.steps=2", "model.vision.args.patch_size=8"), place / kind)
    squares(place / "test.tar", 12, "t")
    squares(place / "other.tar", 10, "o")
    for kind in ("clip", "qformer"):
        asked = Request([str(place / "test.tar")], rerank=4)
        evaluate(str(place / kind), asked, ["retrieval"], out=place / f"of-{kind}", command="vlm evaluate …")
    return place


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of four make a part: three parts, the last one short."""
    monkeypatch.setattr("vlm.eval.features.PART", 8)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return noisy(tmp_path_factory.mktemp("noisy"), "qformer", tokenizer=BPE)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return pack(tmp_path / "data.tar", members(SAMPLES))
