"""Damaged checkpoints: every flipped bit, cut or lost file is noticed, and the checkpoint before it is used."""

import random
import shutil
from pathlib import Path

import pytest

from tests.tiny import records, tiny_run
from vlm import checkpoint
from vlm.config.schema import Run
from vlm.restore import restore
from vlm.train.run import train_run

WAYS = ("flip", "cut", "delete")


def spoil(file: Path, way: str, draw: random.Random) -> None:
    """One bit, the end from somewhere on, or all of the file."""
    data = bytearray(file.read_bytes())
    if way == "delete":
        file.unlink()
        return
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data if way == "flip" else data[:place])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("trained")
    run = tiny_run(folder, "clip", "train.steps=6", "train.save_every=2", "train.keep=3", "train.ema=0.9")
    train_run(run, folder / "run")
    return run, folder / "run"


@pytest.mark.parametrize("seed", range(60))
def test_damage_is_noticed_and_named(
    trained: tuple[Run, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    draw, run = random.Random(seed), tmp_path / "run"
    shutil.copytree(trained[1], run)
    newest, before = run / "step-0000006", run / "step-0000004"
    assert checkpoint.damage(newest) == ""
    file = draw.choice(sorted(newest.iterdir()))
    spoil(file, WAYS[seed % 3], draw)
    assert checkpoint.damage(newest).startswith(file.name)
    assert checkpoint.whole(run) == before
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == f"warning: {newest} is damaged ({checkpoint.damage(newest)}); using step-0000004 in its place"


def test_two_damaged_and_then_all(trained: tuple[Run, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    draw = random.Random(0)
    for step in (6, 4):
        spoil(run / f"step-{step:07d}" / "model.safetensors", "flip", draw)
    assert checkpoint.whole(run).name == "step-0000002"
    assert [record.getMessage().count("using step-0000002") for record in caplog.records] == [1, 1]
    spoil(run / "step-0000002" / "optimizer.safetensors", "cut", draw)
    with pytest.raises(ValueError, match=r"holds no whole checkpoint:(\n.*is damaged.*){3}$"):
        checkpoint.whole(run)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_before_its_damaged_checkpoint(trained: tuple[Run, Path], tmp_path: Path, way: str) -> None:
    """And ends as if nothing had happened, though `keep` is 1 and the damaged one is newer than those saved next."""
    settings, whole = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    spoil(run / "step-0000006" / "optimizer.safetensors", way, random.Random(1))
    once = settings.model_copy(update={"train": settings.train.model_copy(update={"keep": 1, "save_every": 1})})
    assert restore(run).step == 4
    train_run(once, run, resume="auto")
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-0000006"]
    assert checkpoint.damage(run / "step-0000006") == ""
    assert records(run) == records(whole)
    for name in ("model", "optimizer", "average"):
        file = f"step-0000006/{name}.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_a_damaged_best_gives_way_to_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(tmp_path, "clip", "train.steps=4", "train.save_every=2")
    train_run(run, tmp_path / "run")
    (tmp_path / "run" / "best").write_text("step-0000002\n")
    assert restore(tmp_path / "run").step == 2
    spoil(tmp_path / "run" / "step-0000002" / "model.safetensors", "flip", random.Random(2))
    assert restore(tmp_path / "run").step == 4
    assert "step-0000002 is damaged (model.safetensors has changed); using step-0000004" in caplog.text
