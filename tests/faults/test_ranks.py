"""What befalls one of several processes: all end, none hangs, nothing is lost."""

import os
import random
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.command import Commands
from tests.faults.test_kill import KILLS, steps_logged
from tests.tiny import records, settings, squares, write_config

pytestmark = pytest.mark.slow
ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


def config(folder: Path, steps: int = 3000, **train: Any) -> Path:
    given = settings("clip", squares(folder / "squares.tar", 22), steps=steps, accumulate=4, save_every=10)
    given["train"] |= {"log_every": 3} | train
    return write_config(folder / "clip.yaml", given)


def at(step: int, run: Path, act: Callable[[list[int]], None]) -> Callable[[list[int], Path], None]:
    """Does something to the processes once the run has logged so many steps."""

    def wait(processes: list[int], errors: Path) -> None:
        end = time.monotonic() + 60
        while steps_logged(run) < step:
            assert time.monotonic() < end, errors.read_text(encoding="utf-8")
            time.sleep(0.002)
        act(processes)

    return wait


@ENGINES
@pytest.mark.parametrize("told", [0, 1])
def test_asked_to_stop_all_save_one_step(vlm: Commands, tmp_path: Path, engine: str, told: int) -> None:
    """Whoever gets the signal: all agree on a step, save it and exit with 143; the line that the first says goes on."""
    path, run = config(tmp_path), tmp_path / "run"
    given = ("train", path, f"train.parallel={engine}", "--out", run)
    stop = at(12, run, lambda processes: os.kill(processes[told], signal.SIGTERM))
    first, second = vlm.together(2, *given, folder=tmp_path, meanwhile=stop)
    assert (first.code, second.code) == (143, 143), first.err + second.err
    line = first.err.splitlines()[-1]
    assert "stopped and saved at step" in line and second.err == ""
    step = int(line.split("saved at step ")[1].split(";")[0])
    assert (run / f"step-{step:07d}" / "state.json").is_file()
    arguments = line.split("go on with: vlm ")[1].split()
    again = at(step + 6, run, lambda processes: os.kill(processes[0], signal.SIGTERM))
    assert [done.code for done in vlm.together(2, *arguments, folder=tmp_path, meanwhile=again)] == [143, 143]


@ENGINES
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_others_soon(vlm: Commands, tmp_path: Path, engine: str, lost: int) -> None:
    path, run, ended = config(tmp_path), tmp_path / "run", list[float]()

    def kill(processes: list[int]) -> None:
        os.kill(processes[lost], signal.SIGKILL)
        ended.append(time.monotonic())

    given = ("train", path, f"train.parallel={engine}", "--out", run)
    done = vlm.together(2, *given, folder=tmp_path, meanwhile=at(12, run, kill))
    assert time.monotonic() - ended[0] < 5
    assert done[lost].code == -signal.SIGKILL
    other = done[1 - lost]
    assert other.code == 1 and "Traceback" not in other.err
    who = "vlm" if lost == 1 else "vlm, process 1"
    assert other.err.splitlines()[-1].startswith(f"{who}: another process of this run has ended or does not answer")


def test_a_process_that_hangs_is_given_up(vlm: Commands, tmp_path: Path) -> None:
    path, run, stopped = config(tmp_path, timeout=2), tmp_path / "run", list[int]()

    def stop(processes: list[int]) -> None:
        os.kill(processes[1], signal.SIGSTOP)
        stopped.append(processes[1])
        began = time.monotonic()
        while (run / ".lock").exists():  # the first process still holds the folder
            assert time.monotonic() - began < 30
            time.sleep(0.01)
        os.kill(processes[1], signal.SIGKILL)

    first, _ = vlm.together(2, "train", path, "--out", run, folder=tmp_path, meanwhile=at(12, run, stop))
    assert first.code == 1 and "Traceback" not in first.err
    assert "has ended or does not answer" in first.err.splitlines()[-1]


def damaged_features(vlm: Commands, folder: Path) -> tuple[Path, str]:
    """A config on kept features of which one sample's hold an infinity, and its key."""
    assert vlm("train", config(folder, 1), "--out", "encoder", folder=folder).code == 0
    given = settings("decoder", folder / "squares.tar", steps=6, accumulate=4, batch_size=1, save_every=1, keep=9)
    given["model"]["vision"] = given["model"]["vision"] | {"frozen": True}
    given["model"]["init"] = {"vision": str(folder / "encoder")}
    path = write_config(folder / "decoder.yaml", given)
    assert vlm("shards", "features", path, "kept", "--dtype", "float32", folder=folder).code == 0
    (shard,) = (folder / "kept" / "train").glob("*.tar")
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name == "0005.features")
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(np.float32(np.inf).tobytes())
    return path, "0005"


@ENGINES
def test_a_bad_sample_of_one_process_skips_the_step_of_all(vlm: Commands, tmp_path: Path, engine: str) -> None:
    """The step changes nothing anywhere; its samples are named, whichever process had them."""
    path, key = damaged_features(vlm, tmp_path)
    given = ("train", path, "data.train=kept/train", f"train.parallel={engine}", "--out", "run")
    first, second = vlm.together(2, *given, folder=tmp_path)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    rows = records(tmp_path / "run")
    bad, *more = [row["step"] for row in rows if row["train/grad_norm"] is None]
    assert f"warning: step {bad} has no finite gradient and is skipped (1 so far)" in first.err
    assert f"samples {key}" in first.err and second.err == ""
    assert rows[-1]["train/bad_steps"] == 1 + len(more) <= 2
    before, after = (load_file(tmp_path / f"run/step-{step:07d}/model.safetensors") for step in (bad - 1, bad))
    assert bad > 1 and all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_killed_at_random_with_other_numbers_of_processes(vlm: Commands, tmp_path: Path, engine: str) -> None:
    """2, 1, 4, 2, … processes, each time SIGKILL to all: every sample once, and the curve of one that is left alone."""
    steps, draw = 12 * (KILLS + 1), random.Random(engine)
    path = config(tmp_path, steps, log_every=1, save_every=4)
    assert vlm("train", path, "--out", "whole", folder=tmp_path).code == 0
    run = tmp_path / "run"
    given = ("train", path, f"train.parallel={engine}", "--out", run, "--resume", "auto")

    def kill(processes: list[int]) -> None:
        time.sleep(draw.uniform(0, 0.05))
        for process in processes:
            os.kill(process, signal.SIGKILL)

    for i in range(KILLS):
        moment = at(steps_logged(run) // 3 + draw.randint(2, 8), run, kill)
        done = vlm.together((2, 1, 4)[i % 3], *given, folder=tmp_path, meanwhile=moment)
        assert all(each.code == -signal.SIGKILL for each in done), done[0].err
    for done in vlm.together(2, *given, folder=tmp_path):
        assert done.code == 0, done.err
    ours, theirs = records(run), records(tmp_path / "whole")
    assert [row["train/samples_crc"] for row in ours] == [row["train/samples_crc"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["train/loss_itc"] == pytest.approx(other["train/loss_itc"], rel=1e-4)


def test_a_damaged_part_is_noticed(vlm: Commands, tmp_path: Path) -> None:
    """One bit of what a process wrote of the optimizer's memory: the checkpoint before is used."""
    path, run = config(tmp_path, 6, save_every=3), tmp_path / "run"
    given = ("train", path, "train.parallel=fsdp", "--out", run)
    assert all(done.code == 0 for done in vlm.together(2, *given, folder=tmp_path))
    whole = load_file(run / "step-0000006" / "model.safetensors")
    part = sorted((run / "step-0000006" / "optimizer").iterdir())[1]
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    first, _ = vlm.together(2, *given, "--resume", folder=tmp_path)
    assert first.code == 0, first.err
    assert f"step-0000006 is damaged (optimizer/{part.name} has changed); using step-0000003 in its place" in first.err
    again = load_file(run / "step-0000006" / "model.safetensors")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
