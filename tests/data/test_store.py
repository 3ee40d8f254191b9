"""Shards in object stores and of commands: told or mended like those of web servers, and nothing runs unasked."""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from tests.data.shard_files import numbered, write
from vlm.data.cache import Cache
from vlm.data.remote import allow_pipes, find
from vlm.data.shards import Shards, find_shards
from vlm.data.sources import open_pictures


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def tar(folder: Path, first: int = 0, count: int = 3) -> bytes:
    return write(folder / "made.tar", numbered(first, count)).read_bytes()


# --- object stores ---------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe_file(f"/bucket/{i}.tar", tar(tmp_path, 10 * i))
    memory.pipe_file("/bucket/note.txt", b"")
    yield memory
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "spec", ["memory://bucket/{0..2}.tar", "memory://bucket/*.tar", "memory://bucket", "memory://bucket/"]
)
def test_a_store(store: object, cache: Cache, spec: str) -> None:
    shards = Shards(spec, cache=cache)
    assert [str(file).rpartition("/")[2] for file in shards.files] == ["0.tar", "1.tar", "2.tar"]
    assert (len(shards), shards.raw(8).captions[0]) == (9, "number 22")


def test_a_store_tells_sums_and_what_is_missing(store: fsspec.AbstractFileSystem, cache: Cache) -> None:
    data = store.cat_file("/bucket/0.tar")
    entry = {"file": "0.tar", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.pipe_file("/bucket/index.json", json.dumps({"shards": [entry]}).encode())
    (shard,) = find("memory://bucket/0.tar", cache)
    assert shard.listed is not None and shard.fetch().read_bytes() == data
    with pytest.raises(ValueError, match=r"memory:///bucket/9.tar: no such file in the store"):
        Shards("memory://bucket/9.tar", cache=cache)
    with pytest.raises(ValueError, match=r"'memory://bucket/x\*': no .tar file is there"):
        Shards("memory://bucket/x*", cache=cache)
    with pytest.raises(ValueError, match=r"'memory://nowhere': cannot be listed"):
        Shards("memory://nowhere", cache=cache)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("file:///etc/passwd.tar", "name local files by their path"),
        ("file:a.tar", "name local files by their path"),
        ("local://a.tar", "name local files by their path"),
        ("zip://a.tar::http://127.0.0.1:9/x.zip", "name local files by their path"),
        ("nosuch://a/b.tar", "Protocol not known: nosuch; there are http, https, abfs,"),
        ("http://127.0.0.1:9/a b.tar", r"a b\.tar: is no valid address; write strange characters as %-codes"),
        ("http://127.0.0.1:9/ä.tar", r"ä\.tar: is no valid address"),
        ("http://127.0.0.1:nine/a.tar", r"a\.tar: is no valid address"),
        ("http://127.0.0.1:9/shards/", "http lists no folders; name tar files, with braces: …/{000..099}.tar"),
        ("http://127.0.0.1:9/*.tar", "http lists no folders"),
        ("https://127.0.0.1:9/table.csv", "https lists no folders; name tar files"),
        ("https://me:secret@127.0.0.1:9/a.tar", "takes no passwords from addresses"),
    ],
)
def test_other_addresses(spec: str, message: str, cache: Cache) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_pictures(spec, cache=cache)
    assert "secret" not in str(caught.value)


def test_a_missing_package_is_named(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3:// needs a package that is not installed: pip install s3fs"):
        find("s3://bucket/{0..9}.tar", cache)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"fsspec is not installed: pip install 'vlm\[remote\]'"):
        find("s3://bucket/{0..9}.tar", cache)


def test_errors_of_a_stores_own_package(
    store: fsspec.AbstractFileSystem, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BotoCoreError(Exception):
        pass

    def refuse(*arguments: object, **more: object) -> None:
        raise BotoCoreError("Unable to locate credentials")

    monkeypatch.setitem(sys.modules, "botocore.exceptions", SimpleNamespace(BotoCoreError=BotoCoreError))
    for name in ("glob", "size"):
        monkeypatch.setattr(type(store), name, refuse)
    with pytest.raises(ValueError, match=r"'memory://bucket/\*': cannot be listed: Unable to locate credentials"):
        Shards("memory://bucket/*", cache=cache)
    with pytest.raises(ValueError, match=r"0.tar: the store refuses \(Unable to .*\); look at your credentials for it"):
        Shards("memory://bucket/0.tar", cache=cache)


def test_addresses_and_files_side_by_side(store: object, cache: Cache, tmp_path: Path) -> None:
    write(tmp_path / "own.tar", numbered(90, 2))
    places = find_shards(["memory://bucket/1.tar", str(tmp_path / "own.tar"), "memory://bucket/*.tar"], cache)
    assert [str(place).rpartition("/")[2] for place in places] == ["1.tar", "own.tar", "0.tar", "2.tar"]


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_command_is_run_only_where_it_is_allowed(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "0.tar", numbered(0, 2))
    write(tmp_path / "1.tar", numbered(10, 2))
    spec = "pipe:echo ran >> marker; cat {0..1}.tar"
    with pytest.raises(ValueError, match=r"would run a command in a shell; .* --allow-pipe \(no config can\)"):
        open_pictures(spec, cache=cache)
    assert not (tmp_path / "marker").exists()
    with allow_pipes():
        shards = open_pictures(spec, cache=cache)
    assert (tmp_path / "marker").read_text() == "ran\n" * 2
    assert [shards.raw(i).captions[0] for i in range(4)] == [f"number {i}" for i in (0, 1, 10, 11)]
    assert "--allow-pipe: running in a shell: echo ran >> marker; cat 0.tar" in caplog.messages
    with allow_pipes():
        assert len(Shards(spec, cache=cache)) == 4
    assert (tmp_path / "marker").read_text() == "ran\n" * 2  # kept
    with pytest.raises(ValueError, match="--allow-pipe"):
        Shards(spec, cache=cache)


def test_a_command_that_fails_is_not_repeated(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "0.tar", numbered(0, 2))
    with allow_pipes(), pytest.raises(ValueError, match=r"pipe:.*: the command ended with code 3"):
        Shards("pipe:echo ran >> marker; cat 0.tar; exit 3", cache=cache)
    assert (tmp_path / "marker").read_text() == "ran\n"
    with allow_pipes(), pytest.raises(ValueError, match=r"pipe:yes: is larger than the whole cache may be"):
        Shards("pipe:yes", cache=Cache(tmp_path / "small", 1e-3))
    assert not list(cache.folder.rglob("*.tar"))
