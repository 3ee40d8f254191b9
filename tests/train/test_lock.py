"""A run folder has one owner; a lock that a dead process left refuses nobody, and an unused folder goes again."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlm.train.lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from vlm.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_living_process_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = rf"run is in use by another job \(process {other.pid}\): wait"
        with pytest.raises(ValueError, match=message), locked(folder):
            pass
        assert (folder / LOCK).is_file()
        other.kill()
    assert (folder / LOCK).read_text() == f"{other.pid}\n"
    with locked(folder):
        assert (folder / LOCK).read_text() != f"{other.pid}\n"
    assert folder.is_dir() and list(folder.iterdir()) == []  # it was there before


def test_a_folder_nothing_was_put_into_goes_again(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["config.yaml"]
