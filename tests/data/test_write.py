"""Shards hold what the source says, byte for byte the same each time, whole or not at all."""

import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from tests.data.shard_files import picture
from tests.data.shard_files import write as write_tar
from tests.data.source_files import CAPTIONS, LAYOUTS, NAMES, folder, save
from vlm.cli import app
from vlm.data.image import decode
from vlm.data.pictures import PICTURES, Pictures
from vlm.data.shards import RawSample, Shards
from vlm.data.sources import Source, open_pictures
from vlm.data.tars import Names, Tars
from vlm.data.write import Options, Recipe, write, write_shards

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def made(image: bytes, name: str, place: Path) -> Pictures:
    """A folder with one picture."""
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(image)
    (place / name).with_suffix(".txt").write_text("a thing")
    return open_pictures(str(place))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[needs_pyarrow] if "parquet" in name else []) for name in LAYOUTS]
)
def test_every_layout_is_written_alike(layout: str, tmp_path: Path) -> None:
    spec, out = LAYOUTS[layout](tmp_path / "data"), tmp_path / "out"
    write([spec], out, Recipe(samples=12))
    assert sorted(snapshot(out)) == ["000000.tar", "000001.tar", "000002.tar", "index.json", "sizes.json"]
    shards = Shards(str(out), id_field="picture")
    for index, name in enumerate(NAMES):
        raw = shards.raw(index)
        assert (raw.key, raw.captions, raw.image) == (name, CAPTIONS[name], picture(index))
        assert raw.id == f"{name}.png" or layout == "parquet bytes"
        assert raw.fields["key"] == name
    assert json.loads((out / "sizes.json").read_text()) == {"000000.tar": 12, "000001.tar": 12, "000002.tar": 8}
    index = json.loads((out / "index.json").read_text())
    assert (index["samples"], index["captions"], index["bad"], index["renamed"]) == (32, 48, {}, 0)
    assert index["recipe"] == {"samples": 12, "max_mb": 1000, "size": None, "quality": None, "check": True}
    for shard in index["shards"]:
        data = (out / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    read = list(webdataset.WebDataset(str(out / "000002.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == NAMES[24:]
    assert all({"png", "txt", "json"} <= set(sample) for sample in read)


def test_same_bytes_whenever_and_by_however_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = folder(tmp_path / "data")
    options = {"workers": 0}, {"workers": 2}
    for number, given in enumerate(options):
        write([spec], tmp_path / f"out{number}", Recipe(samples=5, size=4), **given)
        monkeypatch.setattr(time, "time", lambda: 5e8)
    assert snapshot(tmp_path / "out0") == snapshot(tmp_path / "out1")


def test_written_anew_only_where_asked(tmp_path: Path) -> None:
    wide = Image.linear_gradient("L").resize((60, 30)).convert("RGB")
    files = {
        "a.jpg": saved(wide, "JPEG", quality=50),
        "b.png": saved(wide, "PNG"),
        "c.webp": saved(wide, "WEBP"),
        "d.gif": saved(wide, "GIF"),
        "e.tiff": saved(wide, "TIFF"),
        "f.png": saved(wide.resize((8, 8)), "PNG"),
    }
    for name, data in files.items():
        source = made(data, name, tmp_path / "data")
    results = {}
    for title, recipe in {
        "plain": Recipe(),
        "small": Recipe(size=20),
        "coarse": Recipe(quality=30),
        "both": Recipe(size=20, quality=30),
    }.items():
        index = write_shards(source, tmp_path / title, recipe)
        samples = webdataset.WebDataset(str(tmp_path / title / "000000.tar"), shardshuffle=False)
        images = [next((k, s[k]) for k in ("jpg", "png", "webp") if k in s) for s in samples]
        results[title] = index["re_encoded"], images
    count, images = results["plain"]
    assert count == 2 and [suffix for suffix, _ in images] == ["jpg", "png", "webp", "png", "png", "png"]
    kept = [data for name, data in files.items() if name not in ("d.gif", "e.tiff")]
    assert [images[i][1] for i in (0, 1, 2, 5)] == kept
    assert decode(images[4][1]).tobytes() == decode(files["e.tiff"]).tobytes()
    count, images = results["small"]
    assert count == 5 and [decode(data).size for _, data in images] == [(40, 20)] * 5 + [(8, 8)]
    assert [suffix for suffix, _ in images] == ["jpg"] * 5 + ["png"] and images[5][1] == files["f.png"]
    coarse, both = results["coarse"], results["both"]
    assert coarse[0] == both[0] == 6 and all(suffix == "jpg" for suffix, _ in [*coarse[1], *both[1]])
    assert [decode(data).size for _, data in coarse[1]] == [(60, 30)] * 5 + [(8, 8)]
    assert len(both[1][0][1]) < len(images[0][1])


def test_turned_pictures_stay_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = made(saved(Image.new("RGB", (60, 30)), "JPEG", exif=exif), "a.jpg", tmp_path / "data")
    write_shards(source, tmp_path / "out", Recipe(size=10))
    assert Image.open(io.BytesIO(Shards(str(tmp_path / "out")).raw(0).image)).size == (10, 20)


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


def spoilt(place: Path, corrupt: int = 1) -> str:
    """A folder with pictures that do not decode, one without words and one without picture."""
    spec = folder(place)
    for name in NAMES[:corrupt]:
        (place / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (place / f"{NAMES[30]}.txt").write_text(" \n")
    (place / f"{NAMES[31]}.png").unlink()
    return spec


def test_bad_samples_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    spec = spoilt(tmp_path / "data", corrupt=2)
    write([spec], tmp_path / "out", Recipe())
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["bad"] == {"not an image": 2, "no image": 1, "empty caption": 1} and index["samples"] == 28
    assert any(line.startswith(f"unusable sample {spec}: p00.png: not an image") for line in caplog.messages)
    printed = capsys.readouterr()
    about = "folder of pictures with .txt or .json beside them; 31 pictures; left out: 1 x no image"
    assert printed.err == f"{spec}: {about}\n"
    assert printed.out.startswith(f"{tmp_path / 'out'}: 28 pictures with 42 captions in 1 shards, ")
    assert printed.out.endswith("left out: 2 x not an image, 1 x no image, 1 x empty caption\n")
    write([spec], tmp_path / "unchecked", Recipe(check=False), json=True)
    unchecked = json.loads(capsys.readouterr().out)
    assert unchecked["bad"] == {"no image": 1, "empty caption": 1} and not unchecked["recipe"]["check"]


def test_too_many_bad_samples(tmp_path: Path) -> None:
    spec = spoilt(tmp_path / "data", corrupt=2)
    with pytest.raises(
        ValueError, match=r"4 of 32 samples are unusable \(not an image: 2, .*max_bad_fraction=0.1; noth"
    ):
        write([spec], tmp_path / "out", Recipe(), max_bad_fraction=0.1)
    write([spec], tmp_path / "out", Recipe(), max_bad_fraction=0.125)
    spec = spoilt(tmp_path / "bad", corrupt=30)
    with pytest.raises(ValueError, match="32 of 32 samples are unusable"):
        write([spec], tmp_path / "none", Recipe())
    assert sorted(os.listdir(tmp_path)) == ["bad", "data", "out"]


def test_a_large_source_stops_early(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(150):
        (data / f"{i:03d}.png").write_bytes(b"no picture" if i < 50 else picture(0))
        (data / f"{i:03d}.txt").write_text("a thing")
    with pytest.raises(ValueError, match=r"data: 50 of 100 samples are unusable \(not an image: 50\)"):
        write([str(data)], tmp_path / "out", Recipe())
    assert os.listdir(tmp_path) == ["data"]


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


def test_images_are_for_paths(tmp_path: Path) -> None:
    spec = folder(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"--images .*data: .*data holds its pictures itself; only tables and JSON name"
    ):
        write([spec], tmp_path / "out", Recipe(), images=tmp_path / "data")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_changes_meanwhile(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(LAYOUTS["csv"](tmp_path / "data"))
    source, raw = open_pictures(str(path)), Source.raw

    def late(self: Source, index: int) -> RawSample:
        if index == 20:
            path.write_text(path.read_text() + "p00.png,more\n")
        return raw(self, index)

    monkeypatch.setattr(Source, "raw", late)
    with pytest.raises(ValueError, match=r"^\S+all\.csv: changed since it was indexed; [^\n]+$"):
        write_shards(source, tmp_path / "out", Recipe(), Options(workers=workers))
    assert os.listdir(tmp_path) == ["data"]


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


def test_shards_again(tmp_path: Path) -> None:
    """Written twice, once as they are and once by an id of their own, they keep keys, fields and captions."""
    write([folder(tmp_path / "data")], tmp_path / "one", Recipe(samples=20))
    write([str(tmp_path / "one")], tmp_path / "two", Recipe(samples=20))
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert {name: one[name] for name in one if name.endswith(".tar")} == {
        name: two[name] for name in two if name.endswith(".tar")
    }
    write([str(tmp_path / "two")], tmp_path / "three", Recipe(), id_field="key")
    assert Shards(str(tmp_path / "three")).raw(4).fields == {"key": "p04", "picture": "p04"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0: must be from 1 to"),
        ({"max_mb": 0}, "max_mb=0"),
        ({"size": 0}, "size=0"),
        ({"quality": 101}, "quality=101: must be from 1 to 100"),
    ],
)
def test_recipes_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("vlm.data.write.write", lambda *args, **kwargs: calls.append((args, kwargs)))
    base = {"image": PICTURES, "caption": "txt;json:caption", "id_field": None, "images": None, "workers": 0}
    base |= {"max_bad_fraction": None, "overwrite": False, "json": False}
    arguments = ["shards", "write", "a.csv", "b.csv", "out"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls.pop() == ((["a.csv", "b.csv"], Path("out"), Recipe()), base)
    arguments = ["shards", "write", "k.json", "out", "--split", "train", "--images", "i", "--image-key", "f"]
    arguments += ["--caption-key", "c", "--id-key", "d", "--samples-per-shard", "5", "--max-mb", "6", "--size", "7"]
    arguments += ["--quality", "8", "--no-check", "--workers", "9", "--max-bad-fraction", "0", "--overwrite", "--json"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    given = {"image": "f", "caption": "json:c", "id_field": "d", "images": Path("i"), "workers": 9}
    given |= {"max_bad_fraction": 0.0, "overwrite": True, "json": True}
    assert calls.pop() == ((["k.json#train"], Path("out"), Recipe(5, 6, 7, 8, False)), given)
    for wrong in (["out"], ["a", "out", "--max-bad-fraction", "2"], ["a", "out", "--workers", "-1"]):
        assert CliRunner().invoke(app, ["shards", "write", *wrong]).exit_code == 2


def test_members_that_are_lost_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"__key__": f"{i}", "png": picture(i), "txt": "a thing", "cls": "3"} for i in range(3)]
    write_tar(tmp_path / "s.tar", samples)
    write([str(tmp_path / "s.tar")], tmp_path / "out", Recipe())
    assert capsys.readouterr().err.endswith("s.tar: tar shards; 3 pictures; members not carried over: cls (3)\n")


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shown = folder(tmp_path / "data"), io.StringIO()
    monkeypatch.setattr("vlm.data.write.Console", lambda stderr: Console(file=shown, force_terminal=True))
    write([spec], tmp_path / "out", Recipe())
    assert "shards" in shown.getvalue() and "/32" in shown.getvalue()
