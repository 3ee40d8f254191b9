"""Checkpoints of another model, torn logs, parts that do not learn, and what equal settings give anywhere, any time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.command import ROOT, Commands
from tests.tiny import records, settings, squares, write_config
from vlm import checkpoint

Tensors = dict[str, Tensor]


def started(vlm: Commands, folder: Path, kind: str = "clip", *overrides: str) -> tuple[str, ...]:
    """The words that go on with a run of four steps in `folder`."""
    squares(folder / "squares.tar")
    write_config(folder / "c.yaml", settings(kind, Path("squares.tar"), save_every=2))
    words = ("train", "c.yaml", *overrides, "--out", "run")
    done = vlm(*words, folder=folder)
    assert done.code == 0, done.err
    return (*words, "--resume")


def other_shape(tensors: Tensors) -> str:
    tensors["text.position"] = torch.zeros(7, 24)
    return "other shape: text.position is 7x24, the model's is 12x24"


def other_type(tensors: Tensors) -> str:
    tensors["text.position"] = tensors["text.position"].half()
    return "other type: text.position is float16, the model's is float32"


def missing(tensors: Tensors) -> str:
    del tensors["text.position"]
    return "missing: text.position 12x24"


def extra(tensors: Tensors) -> str:
    tensors["text.positions"] = torch.zeros(7, 24)
    return "not in the model: text.positions 7x24"


@pytest.mark.parametrize("change", [other_shape, other_type, missing, extra])
def test_a_checkpoint_of_another_model_is_refused_with_the_difference(
    vlm: Commands, tmp_path: Path, change: Callable[[Tensors], str]
) -> None:
    resume = started(vlm, tmp_path)
    newest = checkpoint.latest(tmp_path / "run")
    tensors = load_file(newest / "model.safetensors")
    difference = change(tensors)
    save_file(tensors, newest / "model.safetensors")
    checkpoint.seal(newest, checkpoint.read_state(newest))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in (resume, ("evaluate", "squares.tar", "--model", "run")):
        done = vlm(*words, folder=tmp_path)
        assert (done.code, done.out) == (2, "")
        assert done.err.splitlines()[-2:] == [
            "vlm: run/step-0000004 does not fit the model of its config:",
            f"  {difference}",
        ]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("torn", [b'{"step": 4, "tr', bytes(100), b"\xff\xfe\x00"], ids=["half", "zeros", "noise"])
def test_a_torn_line_of_the_log_loses_no_other(vlm: Commands, tmp_path: Path, torn: bytes) -> None:
    """As a crash after the checkpoint of step 2 leaves it: the line of step 3 goes, since that step is done again."""
    resume = started(vlm, tmp_path)
    run = tmp_path / "run"
    whole = records(run)
    for path in run.glob("step-0000004/*"):
        path.unlink()
    (run / "step-0000004").rmdir()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:3]) + torn)
    done = vlm(*resume, folder=tmp_path)
    assert done.code == 0 and "resuming run at step 2" in done.err, done.err
    assert records(run) == whole


def test_parts_that_get_no_gradient_do_not_hinder_a_resume(vlm: Commands, tmp_path: Path) -> None:
    """The optimizer has no memory of them; those of a stage that trains on one of three losses."""
    resume = started(vlm, tmp_path, "qformer", "losses=[{kind: itc}]", "train.ema=0.9")
    newest = tmp_path / "run" / "step-0000004"
    held = {name.rpartition("/")[0] for name in load_file(newest / "optimizer.safetensors")}
    assert held and set(load_file(newest / "model.safetensors")) - held
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    done = vlm(*resume, folder=tmp_path)
    assert done.code == 0 and "resuming run at step 2" in done.err, done.err
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == files


_ELSEWHERE = """
import runpy, sys, time
clock, shift = time.time, float(sys.argv[1])
time.time = lambda: clock() + shift
sys.argv = ["vlm", *sys.argv[2:]]
runpy.run_module("vlm", run_name="__main__")
"""


@pytest.mark.slow
def test_equal_bytes_in_another_folder_at_another_time_in_another_order_of_hashes(tmp_path: Path) -> None:
    found = []
    for number, (hashes, zone, shift) in enumerate((("1", "UTC", 0), ("2", "Asia/Tokyo", 4e8), ("3", "UTC", -9e8))):
        place = tmp_path / ("deep/" * number) / f"folder {number}"
        place.mkdir(parents=True)
        given = settings("qformer", Path("squares.tar"), ema=0.9)
        given["data"] |= {"augment": {"scale": [0.8, 1.2], "erase": 0.5}, "workers": number % 2}
        squares(place / "squares.tar")
        os.utime(place / "squares.tar", ns=(number * 10**18, number * 10**18))
        write_config(place / "c.yaml", given)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hashes, "TZ": zone}
        words = [sys.executable, "-c", _ELSEWHERE, str(shift), "train", "c.yaml", "--out", "run"]
        subprocess.run(words, cwd=place, env=environment, capture_output=True, check=True)
        files = [place / "run" / "tokenizer.json", *sorted((place / "run" / "step-0000004").iterdir())]
        found.append(({file.name: file.read_bytes() for file in files}, records(place / "run")))
    assert len(found[0][0]) == 5
    assert found[0] == found[1] == found[2]
