"""Damaged checkpoints: every flipped bit, cut or lost file is noticed, and the checkpoint before it is used.

`make test-faults` does a thousand damages; the ordinary suite some.
"""

import os
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
DAMAGES = int(os.environ.get("VLM_TEST_DAMAGES", "60"))


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


@pytest.mark.parametrize("seed", range(DAMAGES))
def test_damage_is_noticed_and_named(trained: tuple[Run, Path], caplog: pytest.LogCaptureFixture, seed: int) -> None:
    draw, run = random.Random(seed), trained[1]
    newest, before = run / "step-0000006", run / "step-0000004"
    assert checkpoint.damage(newest) == ""
    file = draw.choice(sorted(newest.iterdir()))
    data = file.read_bytes()
    spoil(file, WAYS[seed % 3], draw)
    try:
        fault = checkpoint.damage(newest)
        assert fault.startswith(file.name)
        assert checkpoint.whole(run) == before
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning == f"warning: {newest} is damaged ({fault}); using step-0000004 in its place"
    finally:
        file.write_bytes(data)


def test_a_file_that_was_not_saved_with_it_is_damage(trained: tuple[Run, Path], tmp_path: Path) -> None:
    """It would be read like the others: an average, or an optimizer's memory in parts."""
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    newest = run / "step-0000006"
    (newest / ".nfs0001").write_bytes(b"the system's")
    assert checkpoint.damage(newest) == ""
    (newest / "optimizer").mkdir()
    (newest / "optimizer" / "model-00001-of-00001.safetensors").write_bytes(b"")
    assert checkpoint.damage(newest) == "optimizer/model-00001-of-00001.safetensors was not saved with it"
    assert checkpoint.whole(run).name == "step-0000004"


def test_files_that_changed_places_are_damage(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    shutil.copy(run / "step-0000004" / "model.safetensors", run / "step-0000006" / "model.safetensors")
    assert checkpoint.damage(run / "step-0000006") == "model.safetensors has changed"
    shutil.copy(run / "step-0000004" / "state.json", run / "step-0000006" / "state.json")
    assert checkpoint.damage(run / "step-0000006") == "average.safetensors has changed"
    assert checkpoint.whole(run).name == "step-0000004"


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
