"""The preflight: it learns a few samples by heart or says why not, and leaves nothing behind."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.tiny import settings, squares, write_config
from vlm.cli import app
from vlm.train.overfit import overfit


def config(folder: Path, kind: str = "decoder", **train: object) -> Path:
    shard = squares(folder / "squares.tar")
    params = [{"match": ".*", "lr": 1e-2}]
    given = settings(kind, shard, **{"steps": 200, "params": params, "log_every": 50} | train)
    given["data"]["augment"] = {"erase": 1.0}
    return write_config(folder / "run.yaml", given)


@pytest.mark.parametrize("kind", ["clip", "decoder"])
def test_a_model_that_can_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = config(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    assert overfit(path, [], tmp_path / "run", 4)
    assert sorted(tmp_path.iterdir()) == before
    said = capsys.readouterr().out
    assert said.startswith("overfit: 4 samples, step ") and "below half of chance" in said


def test_a_model_that_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not overfit(
        config(tmp_path), ["train.steps=5", "train.params=[{match: '.*', lr: 1e-9}]"], tmp_path / "run", 4
    )
    said = capsys.readouterr().out
    assert said.startswith("overfit: 4 samples, step 5/5  lm ") and ": not below half of chance. Look at" in said


def test_more_samples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=99 exceeds the 16 usable samples"):
        overfit(config(tmp_path), [], tmp_path / "run", 99)


@pytest.mark.parametrize(
    ("more", "code"),
    [(["train.steps=200"], 0), (["train.steps=1"], 1), (["--resume"], 2), (["--overwrite"], 2)],
)
def test_exit_codes(tmp_path: Path, more: list[str], code: int) -> None:
    words = ["train", str(config(tmp_path)), "--out", str(tmp_path / "run"), "--overfit", "4", *more]
    assert CliRunner().invoke(app, words).exit_code == code
    assert not (tmp_path / "run").exists()
