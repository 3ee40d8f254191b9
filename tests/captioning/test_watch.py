"""Pictures that arrive: once, when they are complete."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm.captioning.watch import arrivals


class Looks(threading.Event):
    """In place of the wait between two looks: what happens in the folder meanwhile, then the end."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        super().__init__()
        self._happens: Iterator[Callable[[], object]] = iter(happens)

    def wait(self, timeout: float | None = None) -> bool:
        happens = next(self._happens, None)
        if happens is None:
            self.set()
        else:
            happens()
        return self.is_set()


def nothing() -> None:
    pass


def told(folder: Path, *happens: Callable[[], object], all_of_them: bool = False) -> list[str]:
    looks = Looks(*happens)
    return [str(Path(one.name).relative_to(folder)) for one in arrivals(str(folder), looks, all_of_them)]


def write(path: Path, data: bytes = b"x", time: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(time, time))


def test_what_is_there_is_left_alone_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "old.png")
    assert told(tmp_path, nothing, nothing) == []
    assert told(tmp_path, nothing, nothing, all_of_them=True) == ["old.png"]


def test_what_comes_before_the_first_is_asked_for_is_new(tmp_path: Path) -> None:
    found = arrivals(str(tmp_path), Looks(nothing, nothing))
    write(tmp_path / "new.png")
    assert [Path(one.name).name for one in found] == ["new.png"]


def test_new_ones_once_they_stay_as_they_are(tmp_path: Path) -> None:
    new = tmp_path / "below" / "new.png"
    growing = [lambda: write(new, b"x", 1), lambda: write(new, b"xx", 2), lambda: write(new, b"xxx", 3)]
    assert told(tmp_path, *growing) == []
    new.unlink()
    assert told(tmp_path, *growing, nothing, nothing, nothing) == ["below/new.png"]


def test_a_file_that_is_renamed_when_it_is_whole(tmp_path: Path) -> None:
    draft, whole = tmp_path / ".new.png.tmp", tmp_path / "new.png"
    steps = [lambda: write(draft), nothing, nothing, lambda: draft.replace(whole), nothing, nothing]
    assert told(tmp_path, *steps) == ["new.png"]


def test_other_files_and_empty_ones_and_gone_ones(tmp_path: Path) -> None:
    def come() -> None:
        for name, data in (("a.txt", b"x"), ("b.png", b""), ("c.png", b"x"), ("d.png", b"x")):
            write(tmp_path / name, data)

    assert told(tmp_path, come, (tmp_path / "c.png").unlink, nothing, nothing) == ["d.png"]


def test_changed_ones_come_again(tmp_path: Path) -> None:
    new = tmp_path / "new.png"
    steps = [lambda: write(new), nothing, nothing, lambda: write(new, b"other", 9), nothing, nothing, nothing]
    assert told(tmp_path, *steps) == ["new.png", "new.png"]


def test_a_folder_that_goes(tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    with pytest.raises(OSError, match="inbox: No such file or directory") as error:
        told(tmp_path / "inbox", (tmp_path / "inbox").rmdir, nothing)
    assert not isinstance(error.value, FileNotFoundError)  # which stands for what was wrong before all began
