"""Keys, the size of shards, and a folder that is whole or not there, whatever interrupts."""

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_files import picture
from tests.data.source_files import NAMES, folder, made, save, snapshot
from vlm.data.shards import Shards
from vlm.data.sources import open_pictures
from vlm.data.tars import Names, Tars
from vlm.data.write import Options, Recipe, write, write_shards


def test_keys(tmp_path: Path) -> None:
    records = [
        {"id": key, "image": "p00.png"} for key in ("a/b.c", "a_b_c", "ok", "日本", "x" * 200, "ok", 7, "ok-00000005")
    ]
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]
    source = open_pictures(save(tmp_path / "data", [record | {"conversations": talk} for record in records]))
    index = write_shards(source, tmp_path / "out", Recipe())
    shards = Shards(str(tmp_path / "out"))
    keys = [shards.key(i) for i in range(8)]
    assert keys == [
        "a_b_c-00000000", "a_b_c-00000001", "ok-00000002", "00000003", "x" * 80, "ok-00000005-", "7", "ok-00000005",
    ]  # fmt: skip
    assert index["renamed"] == 6
    assert [shards.raw(i).fields["key"] for i in (0, 3, 6)] == ["a/b.c", "日本", "7"]
    assert {shards.raw(i).fields["picture"] for i in range(8)} == {"p00.png"}
    assert shards.raw(0).fields["conversations"] == talk


def test_numbers_do_not_hit_keys_that_are_there() -> None:
    keys = ["a", "a", "a-00000000"]
    names = Names(keys)
    assert [names(i, key) for i, key in enumerate(keys)] == ["a-00000000-", "a-00000001", "a-00000000"]


def test_shards_end_before_they_grow_too_large(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        (data / f"{i}.png").write_bytes(os.urandom(400_000))
        (data / f"{i}.txt").write_text("noise")
    tars = Tars(tmp_path, 100, 2**20)
    for i in range(5):
        tars.add(str(i), {"png": (data / f"{i}.png").read_bytes()})
    tars.close()
    assert [(shard.file, shard.samples) for shard in tars.written] == [
        ("000000.tar", 2), ("000001.tar", 2), ("000002.tar", 1),
    ]  # fmt: skip
    assert all((tmp_path / shard.file).stat().st_size == shard.bytes <= 2**20 for shard in tars.written)


def test_where_it_may_write(tmp_path: Path) -> None:
    spec, out = folder(tmp_path / "data"), tmp_path / "out"

    def refused(message: str, place: Path, **options: Any) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match=message):
            write([spec], place, Recipe(), **options)
        assert snapshot(tmp_path) == before

    write([spec], out, Recipe(samples=9))
    refused(r"out: exists already; choose another folder, or --overwrite it", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        refused(
            "mine: holds thesis.txt, which `vlm shards write` has not written", tmp_path / "mine", overwrite=overwrite
        )
        refused("thesis.txt: is a file", tmp_path / "mine" / "thesis.txt", overwrite=overwrite)
        refused("lie in each other", tmp_path / "data" / "out", overwrite=overwrite)
    (tmp_path / "mine" / "index.json").write_text('{"shards": []}')
    refused("mine: holds thesis.txt", tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="lie in each other"):
        write([str(out)], out, Recipe(), overwrite=True)
    write([spec], out, Recipe(), overwrite=True)
    assert sorted(snapshot(out)) == ["000000.tar", "index.json", "sizes.json"]
    (tmp_path / "empty").mkdir()
    write([spec], tmp_path / "empty", Recipe())
    assert sorted(os.listdir(tmp_path)) == ["data", "empty", "mine", "out"]


def test_two_at_a_time(tmp_path: Path) -> None:
    spec = folder(tmp_path / "data")
    (tmp_path / ".out.tmp").mkdir()
    with (tmp_path / ".out.tmp" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out: another process is writing it now"):
            write([spec], tmp_path / "out", Recipe())
    write([spec], tmp_path / "out", Recipe())
    assert sorted(os.listdir(tmp_path)) == ["data", "out"]


def test_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, add = folder(tmp_path / "data"), Tars.add

    def interrupted(self: Tars, key: str, members: dict[str, bytes]) -> None:
        add(self, key, members)
        if key == NAMES[20]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Tars, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write([spec], tmp_path / "out", Recipe(samples=8))
    assert os.listdir(tmp_path) == ["data"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, sync, calls = folder(tmp_path / "data"), os.fsync, [0]

    def full(file: int) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write([spec], tmp_path / "out", Recipe(samples=8))
    assert os.listdir(tmp_path) == ["data"]


def killed(action: Callable[[], Any], at: int) -> bool:
    """Runs it in a process that kills itself at the given one of its calls that change files; whether it came to it."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    calls = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in ((Tars, "add"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        setattr(owner, name, watched(getattr(owner, name)))
    action()
    os._exit(0)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_leaves_nothing_that_looks_finished(overwrite: bool, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    source = made(picture(0), "a.png", data)
    for i in range(5):
        source = made(picture(i), f"{i}.png", data)
    write_shards(source, tmp_path / "whole", Recipe(samples=2))
    whole = snapshot(tmp_path / "whole")
    before = {}
    if overwrite:
        write_shards(source, out, Recipe(samples=5))
        before = snapshot(out)

    def action() -> dict[str, Any]:
        return write_shards(source, out, Recipe(samples=2), Options(overwrite=overwrite))

    at, seen = 1, set()
    while killed(action, at):
        found = snapshot(out) if out.exists() else {}
        seen.add("old" if found == before else "new" if found == whole else "neither")
        assert all(name.startswith(".out.") for name in set(os.listdir(tmp_path)) - {"data", "whole", "out"})
        at += 1
        if found == whole or not found:  # as it was, for the next one
            write_shards(source, out, Recipe(samples=5), Options(overwrite=True))
            if not overwrite:
                for path in out.iterdir():
                    path.unlink()
                out.rmdir()
    # Between the two steps of replacing it, the old one waits under a hidden name.
    assert at > 15 and seen <= ({"old", "new", "neither"} if overwrite else {"old", "new"})
    assert snapshot(out) == whole


def test_the_old_one_comes_back_when_replacing_it_was_cut_short(tmp_path: Path) -> None:
    spec, out = folder(tmp_path / "data"), tmp_path / "out"
    write([spec], out, Recipe())
    before = snapshot(out)
    out.replace(tmp_path / ".out.old")
    with pytest.raises(ValueError, match="exists already"):
        write([spec], out, Recipe())
    assert snapshot(out) == before and sorted(os.listdir(tmp_path)) == ["data", "out"]
