"""Processes that read the data and end before their time: the run ends at once, in words, and can go on."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.command import Commands
from tests.faults.test_kill import same_files, steps_logged
from tests.tiny import records, settings, squares, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children of a process are told by /proc"),
]
STEPS = 150


def children(process: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_data_worker_that_is_killed_ends_the_run_in_words(
    vlm: Commands, tmp_path: Path, number: signal.Signals
) -> None:
    given = settings("clip", squares(tmp_path / "squares.tar"), steps=STEPS, save_every=3, log_every=3, ema=0.9)
    config = write_config(tmp_path / "clip.yaml", given)
    run, killed, ended = tmp_path / "run", list[int](), list[float]()

    def kill(process: int, errors: Path) -> None:
        end = time.monotonic() + 60
        while steps_logged(run) < 6:
            assert time.monotonic() < end, errors.read_text(encoding="utf-8")
        killed.append(children(process)[-1])
        os.kill(killed[0], number)
        ended.append(time.monotonic())

    arguments = ("train", config, "data.workers=2", "--out", run)
    done = vlm(*arguments, folder=tmp_path, meanwhile=kill)
    assert time.monotonic() - ended[0] < 5
    assert (done.code, done.out) == (1, "") and "Traceback" not in done.err
    last = done.err.splitlines()[-1].strip("\0")  # torch writes one when a worker ends by a fault of memory
    assert last.startswith("vlm: a process that reads the data has ended (DataLoader worker (pid")
    assert f" {killed[0]})" in last
    assert last.endswith("data.cache_mb. A run goes on from its last checkpoint with --resume")
    assert not (run / ".lock").exists()
    assert vlm(*arguments, "--resume", folder=tmp_path).code == 0
    assert vlm("train", config, "--out", "whole", folder=tmp_path).code == 0
    assert records(run) == records(tmp_path / "whole") and same_files(run, tmp_path / "whole", STEPS) == []
