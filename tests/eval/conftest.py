"""An evaluation of two small runs, for the tests of `vlm evaluate`, its page and `vlm compare`."""

from pathlib import Path

import pytest

from tests.tiny import squares, tiny_run
from vlm.eval.run import evaluate
from vlm.eval.tasks import Request
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
