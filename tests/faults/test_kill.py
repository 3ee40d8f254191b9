"""SIGKILL at random moments, also while saving: the run that goes on equals one left alone, bit for bit.

`make test-faults` kills 20 times; the ordinary suite a few times.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import Commands, commands
from tests.tiny import records, settings, squares, write_config

KILLS = int(os.environ.get("VLM_TEST_KILLS", "5"))
STEPS, SAVE_EVERY = 12 * KILLS, 4
Moment = Callable[[Path, int], bool]  # of the run's folder and its steps so far: now?


def busy_config(folder: Path) -> Path:
    """All that draws at random or remembers; a validation that keeps the best."""
    given = settings("qformer", squares(folder / "squares.tar", 24), steps=STEPS, save_every=SAVE_EVERY)
    given["model"]["connector"] = {**given["model"]["connector"], "dropout": 0.1}
    given["data"] |= {"augment": {"scale": [0.8, 1.2], "rotate": 10, "erase": 0.5}}
    given["data"]["val"] = str(squares(folder / "val.tar", 6, "v"))
    given["train"] |= {"ema": 0.9, "warmup": 3, "log_every": 3, "eval_every": 10, "keep_best": True}
    return write_config(folder / "busy.yaml", given)


def draft(run: Path) -> bool:
    return any(run.glob(".step-*.tmp"))


def steps_logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b'"train/lr"') * 3
    except FileNotFoundError:
        return 0


def killer(run: Path, moment: Moment, delay: float) -> Callable[[int, Path], None]:
    """Kills a command `delay` seconds after the moment has come, unless it has ended by itself."""

    def kill(process: int, stderr: Path) -> None:
        end, before = time.monotonic() + 60, steps_logged(run)
        while not moment(run, steps_logged(run) - before):
            assert time.monotonic() < end, stderr.read_text(encoding="utf-8")
        time.sleep(delay)  # the moment itself: somewhere within what comes next
        os.kill(process, signal.SIGKILL)

    return kill


def moments(kills: int) -> Iterator[tuple[str, Moment, float]]:
    """First before any save, then in steps, while saving, and while starting, at random."""
    draw = random.Random(4)
    yield "before a save", lambda run, steps: (run / "config.yaml").is_file(), 0.0
    for i in range(1, kills):
        kind = ("saving", "steps", "saving", "starting")[i % 4]
        if kind == "steps":
            wanted = draw.randint(3, 9)
            yield kind, lambda run, steps, wanted=wanted: steps >= wanted, draw.uniform(0, 0.03)
        elif kind == "saving":
            yield kind, lambda run, steps: draft(run), draw.uniform(0, 0.004) * draw.randint(0, 1)
        else:
            yield kind, lambda run, steps: True, draw.uniform(0, 0.5)


def same_files(ours: Path, theirs: Path, step: int) -> list[str]:
    """Files of a checkpoint that differ by a byte."""
    names = ("model", "optimizer", "average")
    files = [f"step-{step:07d}/{name}.safetensors" for name in names]
    return [file for file in files if (ours / file).read_bytes() != (theirs / file).read_bytes()]


@pytest.mark.slow
def test_killed_and_resumed_equals_left_alone(vlm: Commands, tmp_path: Path) -> None:
    config = busy_config(tmp_path)
    assert vlm("train", config, "--out", "whole", folder=tmp_path).code == 0
    run, killed, torn = tmp_path / "killed", 0, 0
    for i, (kind, moment, delay) in enumerate(moments(KILLS)):
        arguments = ("train", config, f"data.workers={i % 3}", f"data.cache_mb={i % 2}", "--out", run, "--resume=auto")
        done = vlm(*arguments, folder=tmp_path, meanwhile=killer(run, moment, delay))
        assert done.code == -signal.SIGKILL, (kind, done.err)
        killed, torn = killed + 1, torn + draft(run)
    assert killed == KILLS and torn > 0  # some really died while they wrote a checkpoint
    last = vlm("train", config, "data.workers=1", "--out", run, "--resume", "auto", folder=tmp_path)
    assert last.code == 0, last.err
    assert records(run) == records(tmp_path / "whole")
    assert sum("train/samples_crc" in record for record in records(run)) == STEPS // 3
    assert same_files(run, tmp_path / "whole", STEPS) == []
    assert not draft(run) and not (run / ".lock").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_signal_saves_at_the_step_and_says_how_to_go_on(
    vlm: Commands, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = busy_config(tmp_path)
    run = tmp_path / "run"

    def stop(process: int, stderr: Path) -> None:
        end = time.monotonic() + 60
        while steps_logged(run) < 3:
            assert time.monotonic() < end, stderr.read_text(encoding="utf-8")
        os.kill(process, number)

    done = vlm("train", config, "data.workers=2", "--out", run, folder=tmp_path, meanwhile=stop)
    assert done.code == code
    line = done.err.strip().splitlines()[-1]
    assert "stopped and saved at step" in line and line.endswith("--resume") and "Traceback" not in done.err
    again = vlm(*line.split("go on with: vlm ")[1].split(), folder=tmp_path)
    assert again.code == 0, again.err
    assert vlm("train", config, "--out", "whole", folder=tmp_path).code == 0
    assert records(run) == records(tmp_path / "whole")
    assert same_files(run, tmp_path / "whole", STEPS) == []


@pytest.mark.slow
def test_a_second_job_in_the_folder_is_refused(vlm: Commands, tmp_path: Path) -> None:
    config = busy_config(tmp_path)
    run = tmp_path / "run"
    (tmp_path / "other").mkdir()
    with commands(tmp_path / "other") as other:
        refused = []

        def meanwhile(process: int, stderr: Path) -> None:
            end = time.monotonic() + 60
            while steps_logged(run) < 3:
                assert time.monotonic() < end, stderr.read_text(encoding="utf-8")
            os.kill(process, signal.SIGSTOP)  # it lives, and holds the folder for as long as this takes
            refused.append((process, other("train", config, "--out", run, "--resume", "auto", folder=tmp_path)))
            os.kill(process, signal.SIGCONT)

        assert vlm("train", config, "--out", run, folder=tmp_path, meanwhile=meanwhile).code == 0
    ((owner, answer),) = refused
    assert answer.code == 2
    assert answer.err.strip() == (
        f"vlm: {run} is in use by another job (process {owner}): wait for it, stop it, or choose another --out"
    )
    (run / ".lock").write_text(f"{owner}\n")  # as a killed job leaves it
    assert vlm("train", config, "--out", run, "--resume", folder=tmp_path).code == 0


def test_resume_auto_of_other_settings_names_them(vlm: Commands, tmp_path: Path) -> None:
    config = busy_config(tmp_path)
    arguments = ("train", config, "train.steps=4", "--out", "run")
    assert vlm(*arguments, "--resume", "auto", folder=tmp_path).code == 0
    done = vlm(*arguments, "train.seed=5", "train.keep=1", "data.workers=1", "--resume", "auto", folder=tmp_path)
    assert done.code == 2
    assert done.err.splitlines()[1:] == ["  train.seed: was 0, now 5"]
