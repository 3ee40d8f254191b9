"""Shards by address: what goes wrong on the way is told or mended, nothing is fetched twice, nothing runs unasked."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request

import pytest

from tests.data.shard_files import numbered, write
from tests.data.web import Reply, Site, cut, endless, failing, headed, page, send, serving
from vlm.data import fetch, remote
from vlm.data.cache import Cache
from vlm.data.remote import Remote, find
from vlm.data.shards import Shards
from vlm.data.sources import open_pictures


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    with serving() as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def tar(folder: Path, first: int = 0, count: int = 3) -> bytes:
    return write(folder / "made.tar", numbered(first, count)).read_bytes()


def fetched(site: Site, cache: Cache) -> bytes:
    (shard,) = find(f"{site.url}/a.tar", cache)
    assert isinstance(shard, Remote)
    return shard.fetch().read_bytes()


# --- http ------------------------------------------------------------------------------------------------------------


def test_braces_and_a_second_start(site: Site, cache: Cache, tmp_path: Path) -> None:
    for i in range(3):
        site.files[f"/s/{i}.tar"] = tar(tmp_path, 10 * i)
    for _ in range(2):
        shards = open_pictures(site.url + "/s/{0..2}.tar", cache=cache)
        assert [shards.key(i) for i in range(len(shards))] == [f"k{10 * n + i:05d}" for n in range(3) for i in range(3)]
        assert shards.raw(4).captions[0] == "number 11" and shards.where(4) == f"{site.url}/s/1.tar: k00011"
    assert [site.asked[f"/s/{i}.tar"] for i in range(3)] == [1, 1, 1]
    assert not list(cache.folder.rglob("*.part"))


def test_a_start_with_an_index_fetches_one_shard_at_most(site: Site, cache: Cache, tmp_path: Path) -> None:
    for i in range(3):
        site.files[f"/{i}.tar"] = tar(tmp_path, 10 * i)
    Shards(site.url + "/{0..2}.tar", cache=cache)
    for file in cache.folder.rglob("*.tar"):
        file.unlink()
    site.asked.clear()
    shards = Shards(site.url + "/{0..2}.tar", cache=cache)
    assert (len(shards), sum(site.asked[f"/{i}.tar"] for i in range(3))) == (9, 1)
    assert shards.raw(8).captions[0] == "number 22"


@pytest.mark.parametrize("tag", [True, False])
def test_a_broken_connection_is_taken_up(site: Site, cache: Cache, tmp_path: Path, tag: bool) -> None:
    site.files["/a.tar"] = tar(tmp_path)
    site.script["/a.tar"] = [cut(700, tag), failing(503), cut(2000, tag)]
    assert fetched(site, cache) == site.files["/a.tar"]
    assert site.ranges == (["bytes=700-", "bytes=700-", "bytes=2000-"] if tag else [])


def test_a_shard_that_changes_on_the_way_is_begun_anew(site: Site, cache: Cache, tmp_path: Path) -> None:
    site.files["/a.tar"], other = tar(tmp_path), tar(tmp_path, 50)

    def replaced(handler: object, data: bytes) -> None:
        cut(700)(handler, data)  # type: ignore[arg-type]
        site.files["/a.tar"] = other

    site.script["/a.tar"] = [replaced]
    assert fetched(site, cache) == other


def test_another_part_than_asked_for_is_not_used(site: Site, cache: Cache, tmp_path: Path) -> None:
    whole = site.files["/a.tar"] = tar(tmp_path)
    wrong = headed(whole[512:], 206, ETag=f'"{hash(whole)}"', Content_Range=f"bytes 512-{len(whole) - 1}/{len(whole)}")
    site.script["/a.tar"] = [cut(700), wrong]
    assert fetched(site, cache) == whole


def test_a_server_that_stalls(site: Site, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    site.files["/a.tar"] = tar(tmp_path)

    def stall(handler: object, data: bytes) -> None:
        cut(700)(handler, data)  # type: ignore[arg-type]
        handler.wfile.flush()  # type: ignore[attr-defined]
        site.go_on.wait()

    site.script["/a.tar"] = [stall]
    assert fetched(site, cache) == site.files["/a.tar"]
    site.files["/a.tar"] += bytes(512)
    site.script["/a.tar"] = [stall] * 4
    with pytest.raises(ValueError, match=r"a\.tar: (timed out|The read operation timed out); tried 4 times"):
        fetched(site, Cache(tmp_path / "other"))


@pytest.mark.parametrize(
    ("reply", "tries", "message"),
    [
        (failing(404), 1, r"a\.tar: the server answers 404 Not Found; look at the address and its braces"),
        (failing(403), 1, r"a\.tar: the server answers 403 Forbidden; where it wants a login, download the shards"),
        (failing(500), 4, r"a\.tar: the server answers 500 .*; tried 4 times. Try again later, or download the shards"),
        (page, 1, r"a\.tar: the server answers with a web page; look at the address, or whether it wants a login"),
        (headed(b"<!DOCTYPE html>" * 99), 1, r"a\.tar: what comes is no plain tar file; it begins with b"),
        (headed(b"short"), 1, r"a\.tar: what comes is no plain tar file; it begins with b'short'"),
        (headed(bytes(512), Content_Encoding="gzip"), 1, r"a\.tar: the server compresses what it sends \(gzip\)"),
        (cut(700, tag=False), 4, r"a\.tar: 700 of 20480 bytes came; tried 4 times"),
        (endless, 1, r"a\.tar: the server does not say how long it is"),
        (headed(b"", 302, Location="file:///etc/passwd"), 1, r"'file:///etc/passwd' is not allowed; only http\(s\) is"),
        (headed(b"", 302, Location="ftp://127.0.0.1/a.tar"), 1, r"redirects to ftp://127.0.0.1/a.tar, which is not"),
        (headed(b"x", 206), 1, r"a\.tar: the server sends a part and does not say which"),
    ],
)  # fmt: skip
def test_refusals(site: Site, cache: Cache, tmp_path: Path, reply: Reply, tries: int, message: str) -> None:
    site.files["/a.tar"] = tar(tmp_path)
    site.script["/a.tar"] = [reply] * 9
    with pytest.raises(ValueError, match=message):
        Shards(f"{site.url}/a.tar?signature=secret", cache=cache)
    assert site.asked["/a.tar"] == tries
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == []


def test_signatures_are_not_shown(site: Site, cache: Cache) -> None:
    with pytest.raises(ValueError, match="404") as caught:
        Shards(f"{site.url}/a.tar?signature=secret", cache=cache)
    assert "secret" not in str(caught.value)


def test_redirects_are_followed(site: Site, cache: Cache, tmp_path: Path) -> None:
    site.files |= {"/a.tar": b"", "/b": tar(tmp_path)}
    site.script["/a.tar"] = [headed(b"", 302, Location="/b")]
    assert fetched(site, cache) == site.files["/b"]


@pytest.mark.parametrize(("before", "after", "allowed"), [("https", "https", True), ("https", "http", False)])
def test_a_redirect_does_not_leave_tls(before: str, after: str, allowed: bool) -> None:
    arguments: list[Any] = [Request(f"{before}://a/x.tar"), None, 302, "Found", HTTPMessage(), f"{after}://b/y.tar?key"]
    if allowed:
        found = fetch._Redirects().redirect_request(*arguments)
        assert found is not None and found.full_url == "https://b/y.tar?key"
        return
    with pytest.raises(fetch.Final, match=r"redirects to http://b/y.tar, which is not https$"):
        fetch._Redirects().redirect_request(*arguments)


def test_no_server(site: Site, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/a\.tar: Connection refused; tried 4 times"):
        Shards("http://127.0.0.1:9/a.tar", cache=cache)
    assert caplog.messages == [
        "http://127.0.0.1:9/index.json: Connection refused; shards that are in the cache are used as they are"
    ]


# --- index.json ------------------------------------------------------------------------------------------------------


def listed(site: Site, data: bytes, **changes: object) -> None:
    entry = {"file": "a.tar", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
    site.files["/index.json"] = json.dumps({"shards": [entry]}).encode()


def test_the_sums_beside_the_shards_are_checked(site: Site, cache: Cache, tmp_path: Path) -> None:
    whole = site.files["/a.tar"] = tar(tmp_path)
    listed(site, whole)
    site.script["/a.tar"] = [headed(whole[:-512] + b"x" * 512)]
    assert fetched(site, cache) == whole and site.asked["/a.tar"] == 2
    listed(site, whole, bytes=7)
    with pytest.raises(ValueError, match=r"20480 bytes with sha256 \w{64} came, and index.json beside it lists 7, "):
        fetched(site, Cache(tmp_path / "other"))


def test_a_new_sum_makes_cache_and_index_stale(site: Site, cache: Cache, tmp_path: Path) -> None:
    for first in (0, 100):
        site.files["/a.tar"] = tar(tmp_path, first)
        listed(site, site.files["/a.tar"])
        assert Shards(f"{site.url}/a.tar", cache=cache).key(0) == f"k{first:05d}"
    assert len(list(cache.folder.rglob("*.tar"))) == 1


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"shards": [{"file": "a.tar", "bytes": 1, "sha256": "../../x"}]}', '{"shards": 7}']
)
def test_an_index_json_of_something_else_is_nothing(site: Site, cache: Cache, tmp_path: Path, text: str) -> None:
    site.files |= {"/a.tar": tar(tmp_path), "/index.json": text.encode()}
    assert find(f"{site.url}/a.tar", cache)[0].listed is None
    assert fetched(site, cache) == site.files["/a.tar"]


def test_another_shard_under_the_same_name_is_refused_and_then_indexed(
    site: Site, cache: Cache, tmp_path: Path
) -> None:
    site.files["/a.tar"] = tar(tmp_path)
    shards = Shards(f"{site.url}/a.tar", cache=cache)
    site.files["/a.tar"] = tar(tmp_path, 100)
    next(cache.folder.rglob("*.tar")).unlink()
    with pytest.raises(ValueError, match=r"a\.tar: changed since it was indexed; start again"):
        shards.raw(0)
    assert Shards(f"{site.url}/a.tar", cache=cache).raw(0).captions[0] == "number 100"


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_bound_drops_what_was_not_used_for_longest(site: Site, tmp_path: Path) -> None:
    for i in range(4):
        site.files[f"/{i}.tar"] = tar(tmp_path, 10 * i)
    size = len(site.files["/0.tar"])
    cache = Cache(tmp_path / "cache", 2.9 * size / 2**30)
    (cache.folder / "mine").mkdir(parents=True)
    (cache.folder / "mine" / "0.tar").write_bytes(bytes(5 * size))
    shards = find(site.url + "/{0..3}.tar", cache)
    handles = [remote.opened(shard)[0] for shard in shards[:2]]
    age(shards[0], 1000)
    age(shards[1], 9000)
    remote.opened(shards[2])[0].close()
    age(shards[2], 500)
    assert [shard.kept() is not None for shard in shards] == [True, False, True, False]
    assert handles[1].read() == site.files["/1.tar"]  # unlinked, and yet open
    remote.opened(shards[0])[0].close()  # used now
    remote.opened(shards[3])[0].close()
    assert [shard.kept() is not None for shard in shards] == [True, False, False, True]
    assert (cache.folder / "mine" / "0.tar").stat().st_size == 5 * size
    for handle in handles:
        handle.close()


def age(shard: Remote, seconds: float) -> None:
    path = shard.kept()
    assert path is not None
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_a_shard_larger_than_the_cache(site: Site, tmp_path: Path) -> None:
    site.files["/a.tar"] = tar(tmp_path)
    with pytest.raises(ValueError, match=r"a\.tar: .* GB are more than the cache may hold; raise data.shard_cache_gb="):
        fetched(site, Cache(tmp_path / "cache", 5000 / 2**30))


def test_a_full_disk(site: Site, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        site.files[f"/{name}.tar"] = tar(tmp_path)
    a, b = find(site.url + "/{a,b}.tar", cache)
    a.fetch()
    size, free = len(site.files["/a.tar"]), [5, 5, 50_000, 50_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free.pop(0)))
    b.fetch()
    assert size < 50_000 and a.kept() is None and b.kept() is not None  # it made room
    free[:] = [5] * 9
    with pytest.raises(ValueError, match=r"a\.tar: .*cache has no room for .* GB; set data\.shard_cache"):
        a.fetch()


def test_training_goes_on_when_the_cache_is_smaller_than_the_shards(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        site.files[f"/{i}.tar"] = tar(tmp_path, 10 * i)
    shards = Shards(site.url + "/{0..2}.tar", cache=Cache(tmp_path / "cache", 45_000 / 2**30))
    assert "the shards by address take 5.72e-05 GB, so they will be fetched again and again" in caplog.text
    assert [shards.raw(i).captions[0] for i in (0, 8, 3, 1)] == ["number 0", "number 22", "number 10", "number 1"]


FETCH = """
import sys
from pathlib import Path
from vlm.data.cache import Cache
from vlm.data.remote import Remote
print("ready", flush=True)
print(Remote(sys.argv[1], Cache(Path(sys.argv[2]))).fetch(), flush=True)
"""


def test_two_processes_fetch_once(site: Site, tmp_path: Path) -> None:
    whole = site.files["/a.tar"] = tar(tmp_path)

    def halting(handler: object, data: bytes) -> None:
        assert site.go_on.wait(60)
        send(handler, data, len(data))  # type: ignore[arg-type]

    site.script["/a.tar"] = [halting]
    command = [sys.executable, "-c", FETCH, f"{site.url}/a.tar", str(tmp_path / "cache")]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second,
    ):
        for process in (first, second):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert site.arrived.wait(60)
        site.go_on.set()
        paths = {process.communicate()[0] for process in (first, second)}
    (path,) = paths
    assert site.asked["/a.tar"] == 1 and Path(path.strip()).read_bytes() == whole


def test_a_download_that_was_killed_leaves_nothing_in_the_way(site: Site, cache: Cache, tmp_path: Path) -> None:
    site.files["/a.tar"] = tar(tmp_path)

    def halting(handler: object, data: bytes) -> None:
        cut(700)(handler, data)  # type: ignore[arg-type]
        handler.wfile.flush()  # type: ignore[attr-defined]
        site.go_on.wait()

    site.script["/a.tar"] = [halting]
    command = [sys.executable, "-c", FETCH, f"{site.url}/a.tar", str(cache.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert site.arrived.wait(60)
        process.kill()
    assert [path.suffix for path in cache.folder.rglob("*.*")] == [".part"]
    assert fetched(site, cache) == site.files["/a.tar"]
