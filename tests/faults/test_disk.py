"""A disk that fills up while a run saves: no checkpoint is harmed, training goes on, and nothing is half-written.

A limit on the size of the process's files stands for the disk: the system refuses a write in the middle, as it would.
"""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import Commands, wait_for
from tests.faults.test_kill import draft, same_files
from tests.tiny import records, settings, squares, write_config
from vlm import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no limits for another process on this system"),
]
STEPS = 200
ROOM = 20_000  # bytes: the log and its lines fit in, the weights do not


@pytest.fixture
def config(tmp_path: Path) -> Path:
    given = settings("clip", squares(tmp_path / "squares.tar"), steps=STEPS, save_every=10, log_every=30, ema=0.9)
    return write_config(tmp_path / "clip.yaml", given)


def limit(process: int, size: int) -> None:
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_after_a_save(run: Path, then: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
    """The disk is full once the run has a checkpoint."""

    def act(process: int, errors: Path) -> None:
        end = time.monotonic() + 60
        while not checkpoint.checkpoints(run):
            assert time.monotonic() < end, errors.read_text(encoding="utf-8")
        limit(process, ROOM)
        then(process, errors)

    return act


def test_training_goes_on_and_saves_when_there_is_room_again(vlm: Commands, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def wait(process: int, errors: Path) -> None:
        wait_for(errors, "training goes on and saves again")
        assert checkpoint.damage(checkpoint.latest(run)) == ""
        limit(process, resource.RLIM_INFINITY)

    done = vlm("train", config, "--out", run, folder=tmp_path, meanwhile=full_after_a_save(run, wait))
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: could not save step ")]
    assert warnings and "File too large" in warnings[0]
    assert warnings[0].endswith(
        "; the checkpoints before it are whole; training goes on and saves again after 10 steps"
    )
    assert vlm("train", config, "--out", "whole", folder=tmp_path).code == 0
    assert records(run) == records(tmp_path / "whole") and same_files(run, tmp_path / "whole", STEPS) == []
    assert not draft(run)


def test_a_last_save_that_fails_ends_in_words_and_can_be_made_up_for(
    vlm: Commands, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = vlm(
        "train", config, "--out", run, folder=tmp_path, meanwhile=full_after_a_save(run, lambda process, errors: None)
    )
    assert (done.code, done.out) == (1, "") and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith(f"vlm: could not save step {STEPS} in {run}: ") and "File too large" in last
    assert last.endswith("; the checkpoints before it are whole")
    newest = checkpoint.latest(run)
    assert newest.name < f"step-{STEPS:07d}" and checkpoint.damage(newest) == "" and not draft(run)
    assert vlm("train", config, "--out", run, "--resume", folder=tmp_path).code == 0
    assert checkpoint.latest(run).name == f"step-{STEPS:07d}"
