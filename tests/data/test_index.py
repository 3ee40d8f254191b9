"""The index in a file says what the shards say; a stale or damaged one is made anew, by one process."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.shard_files import numbered, picture, write
from vlm.data import index as module
from vlm.data.cache import Cache
from vlm.data.shards import Shards


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def faulty(folder: Path) -> Path:
    """Shards with an empty one, repeated keys within and across, other members, a damaged end."""
    folder.mkdir()
    more: list[dict[str, Any]] = [{"__key__": "x", "png": picture(1)}, {"__key__": "y", "txt": "text", "cls": "3"}]
    write(folder / "a.tar", [*numbered(0, 3), *more, {"__key__": "über/é", "jpg": picture(2), "txt": "long"}])
    write(folder / "b.tar", [])
    write(folder / "c.tar", [*numbered(2, 4), *numbered(4, 1)])
    whole = write(folder / "d.tar", numbered(50, 3)).read_bytes()
    (folder / "d.tar").write_bytes(whole[:6000])
    return folder


def told(shards: Shards) -> Any:
    keys = [(shards.key(i), shards.where(i), shards.raw(i)) for i in range(len(shards))]
    return len(shards), keys, shards.bad, shards.others


def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry each time an index is made of shards."""
    calls: list[int] = []
    build = module.build

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return build(*arguments)

    monkeypatch.setattr(module, "build", counted)
    return calls


def test_a_second_start_reads_no_shard_and_says_the_same(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, calls = faulty(tmp_path / "shards"), built(monkeypatch)
    first = told(Shards(str(folder), cache=cache))
    lines = list(caplog.messages)
    caplog.clear()
    assert told(Shards(str(folder), cache=cache)) == first and caplog.messages == lines and len(calls) == 1
    assert first[0] == 8 and first[2] == {"duplicate key": 2, "no caption": 1, "no image": 1, "damaged shard": 1}
    assert len(lines) == 2 and first[3] == {"cls": 1}
    assert [key for key, _, _ in first[1]][3:5] == ["über/é", "k00003"]


def test_in_memory_and_mapped_are_equal(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "file").touch()
    folder = faulty(tmp_path / "shards")
    assert told(Shards(str(folder), cache=Cache(tmp_path / "file"))) == told(Shards(str(folder), cache=cache))


def test_where_nothing_can_be_kept_a_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert len(Shards(str(write(tmp_path / "s.tar", numbered(0, 3))), cache=Cache(tmp_path / "file"))) == 3
    (line,) = caplog.messages
    assert line.endswith(".index: Not a directory; the index is made anew at every start (data.shard_cache)")


def test_what_makes_it_stale(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, calls = str(write(tmp_path / "s.tar", numbered(0, 3))), built(monkeypatch)
    Shards(spec, cache=cache)
    Shards(spec, caption="json:caption", id_field="kind", max_bad_fraction=0.5, cache=cache)
    assert len(calls) == 2  # txt is a suffix that the second does not look for
    Shards(spec, caption="json:kind", cache=cache)
    assert len(calls) == 2
    write(tmp_path / "s.tar", numbered(3, 4))
    assert Shards(spec, cache=cache).key(0) == "k00003" and len(calls) == 3
    Shards(spec, image="png", cache=cache)
    assert len(calls) == 4
    monkeypatch.setattr(module, "_FORMAT", 10**6)
    Shards(spec, cache=cache)
    assert len(calls) == 5


@pytest.mark.parametrize("where", [0, 40, 200, 400, -30, -2])
def test_a_damaged_one_is_made_anew(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: int
) -> None:
    spec, calls = str(write(tmp_path / "s.tar", numbered(0, 3))), built(monkeypatch)
    before = told(Shards(spec, cache=cache))
    (file,) = cache.folder.rglob("*.index")
    whole = file.read_bytes()
    for spoilt in (bytearray(whole), whole[: len(whole) + where] if where < 0 else whole[:where]):
        if isinstance(spoilt, bytearray):
            spoilt[where] ^= 1
        caplog.clear()
        file.write_bytes(spoilt)
        assert told(Shards(spec, cache=cache)) == before
        assert caplog.messages == [f"{file}: this index is damaged; it is made anew"]
        assert file.read_bytes() == whole
    assert len(calls) == 3


def test_another_process_maps_it_too(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = built(monkeypatch)
    shards = Shards(str(faulty(tmp_path / "shards")), cache=cache)
    sent = pickle.dumps(shards)
    assert told(pickle.loads(sent)) == told(shards) and len(calls) == 1
    index = shards._index
    assert index.path is not None and index.places.nbytes not in range(len(pickle.dumps(index)))
    index.forget()
    with pytest.raises(ValueError, match="this index of shards is gone; start again"):
        pickle.loads(sent)


BUILD = """
import sys
from pathlib import Path
from vlm.data import index
from vlm.data.cache import Cache
from vlm.data.shards import Shards
build = index.build
def slow(*arguments):
    print("builds", flush=True)
    sys.stdin.readline()
    return build(*arguments)
index.build = slow
print("ready", flush=True)
print(len(Shards(sys.argv[1], cache=Cache(Path(sys.argv[2])))), flush=True)
"""


def test_of_two_processes_one_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(write(tmp_path / "s.tar", numbered(0, 5))), str(tmp_path / "cache")]
    pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipe) as first:
        assert first.stdout.readline() + first.stdout.readline() == "ready\nbuilds\n"
        with subprocess.Popen(command, **pipe) as second:
            assert second.stdout.readline() == "ready\n"
            assert second.stderr.readline().endswith(".part: another process reads the shards; waiting for it\n")
            assert first.communicate("go\n")[0] == "5\n"
            assert second.communicate("go\n")[0] == "5\n"


def test_bytes_of_a_sample(tmp_path: Path) -> None:
    """Four bytes and the key, and eight for each suffix that occurs; the shard costs nothing."""
    record = module.Record("jpg;png", "txt;json:caption")
    table = module._Table(list(record.columns))
    for i in range(1000):
        table.add(
            i // 100, f"{i:09d}", {"jpg": (512 * i + 512, 100), "txt": (512 * i + 1024, 7), "json": (9 * 512, 2**33)}
        )
    index = table.index([(1, 2)] * 10, module.Facts())
    arrays = (index.places, index.ends, index.keys)
    assert sum(array.nbytes for array in arrays) == 1000 * (3 * 8 + 4 + 9)
    assert index.member(999, "txt") == (512 * 1001, 7) and index.member(999, "png") == (-1, 0)
    assert index.member(5, "json") == (9 * 512, 2**32 - 1)  # above the largest that is ever read
    assert [index.key(i) for i in (0, 99, 100, 999)] == ["000000000", "000000099", "000000100", "000000999"]
    assert [index.shard(i) for i in (0, 99, 100, 999)] == [0, 0, 1, 9]
    assert index.places.dtype == index.ends.dtype == np.uint32
