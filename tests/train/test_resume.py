"""A run that was cut short and goes on ends bit for bit where an uninterrupted one does."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import VISION, read, records, squares, tiny_run
from vlm import checkpoint
from vlm.config.load import dump
from vlm.config.schema import Run
from vlm.restore import restore
from vlm.train.log import Log
from vlm.train.run import train_run

# All that draws at random or remembers: dropout, augmentation, hard negatives, the average, validation in between.
BUSY = (
    "train.steps=12",
    "train.save_every=3",
    "train.eval_every=4",
    "train.ema=0.9",
    "train.accumulate=2",
    "train.warmup=3",
    "data.augment={scale: [0.8, 1.2], rotate: 10, hue: 0.1, erase: 0.5}",
)
DROPOUT = ("model.connector.dropout=0.2", "model.vision.args.proj_drop_rate=0.2")


def busy(folder: Path) -> Run:
    return tiny_run(folder, "qformer", *BUSY, *DROPOUT, f"data.val={squares(folder / 'val.tar', 6, 'v')}")


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Acts right after that step was logged."""
    original = Log.step

    def logged(self: Log, done: int, *arguments: Any) -> None:
        original(self, done, *arguments)
        if done == step:
            action()

    monkeypatch.setattr(Log, "step", logged)


def kill() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "error", "stop", "start"), [(kill, Killed, 8, 6), (interrupt, KeyboardInterrupt, 7, 7)]
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Any, error: Any, stop: int, start: int
) -> None:
    run = busy(tmp_path)
    train_run(run, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(error):
        at_step(patch, stop, action)
        train_run(run, tmp_path / "parts")
    assert checkpoint.latest(tmp_path / "parts").name == f"step-{start:07d}"
    torch.rand(5)
    train_run(run, tmp_path / "parts", resume=True)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert [r["step"] for r in records(tmp_path / "whole") if "val/loss_itc" in r] == [4, 8, 12]
    for name in ("model", "average", "optimizer"):
        file = f"step-0000012/{name}.safetensors"
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert set(whole) == set(parts)
        assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []


def test_resume_from_the_run_s_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message after Ctrl-C says; also where parts came from a run beside it."""
    monkeypatch.chdir(tmp_path)
    train_run(tiny_run(Path(), "clip"), Path("runs/a"))
    run = tiny_run(Path(), "qformer", "model.init.vision=runs/a", "model.vision.frozen=true")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 2, interrupt)
        train_run(run, Path("runs/b"))
    train_run(read(Path("runs/b/config.yaml")), Path("runs/b"), resume=True)
    assert [r["step"] for r in records(Path("runs/b"))] == [1, 2, 3, 4]
    shutil.move("runs", "moved")  # the tree keeps its sense elsewhere
    assert restore(Path("moved/b")).step == 4


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "clip")
    train_run(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train_run(run, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def frozen_from_a_file(folder: Path, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    encoder = timm.create_model(str(VISION["name"]), num_classes=0, **VISION["args"])  # type: ignore[arg-type]
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    return tiny_run(
        folder, "decoder", f"model.vision.weights={folder / 'encoder.safetensors'}", "model.vision.frozen=true"
    )


def test_a_frozen_encoder_is_named_and_hashed(tmp_path: Path) -> None:
    train_run(frozen_from_a_file(tmp_path), tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run")
    assert {name.split(".")[0] for name in load_file(newest / "model.safetensors")} == {"connector", "language"}
    assert json.loads((newest / "state.json").read_text())["frozen"]["tensors"] > 0
    assert restore(tmp_path / "run").step == 4
    frozen_from_a_file(tmp_path, seed=1)  # the file changes behind the run's back
    with pytest.raises(ValueError, match="trained on other frozen weights"):
        restore(tmp_path / "run")


def test_a_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    train_run(tiny_run(tmp_path, "clip"), tmp_path / "run")
    held = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"differ from .*config\.yaml; .* folder:\n  train\.steps: was 4, now 9$"):
        train_run(tiny_run(tmp_path, "clip", "train.steps=9"), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == held


@pytest.mark.parametrize("mistake", ["data.train=nowhere.tar", "train.batch_size=999", "data.max_tokens=2"])
def test_a_mistake_costs_no_earlier_run(tmp_path: Path, mistake: str) -> None:
    """Not even with --overwrite; and where there was no run, none is begun."""
    train_run(tiny_run(tmp_path, "clip"), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    wrong = tiny_run(tmp_path, "clip", mistake)
    for out in ("run", "new"):
        with pytest.raises(ValueError):
            train_run(wrong, tmp_path / out, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_overwrite_leaves_nothing_of_the_earlier_run(tmp_path: Path) -> None:
    train_run(tiny_run(tmp_path, "clip", "train.steps=6", "train.save_every=3"), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run = tiny_run(tmp_path, "decoder")
    train_run(run, tmp_path / "run", overwrite=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "tokenizer.json", "metrics.jsonl", "latest", "step-0000004", "notes.txt"}
    assert {r["step"] for r in records(tmp_path / "run")} == {1, 2, 3, 4}
    assert (tmp_path / "run" / "config.yaml").read_text() == dump(run)
