"""Shards hold what the source says, byte for byte the same each time, whole or not at all."""

import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from tests.data.shard_files import picture
from tests.data.shard_files import write as write_tar
from tests.data.source_files import CAPTIONS, LAYOUTS, NAMES, folder, made, marked, snapshot
from vlm.cli import app
from vlm.data.image import decode
from vlm.data.pictures import PICTURES
from vlm.data.shards import RawSample, Shards
from vlm.data.sources import Source, open_pictures
from vlm.data.write import Options, Recipe, write, write_shards


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("layout", marked(LAYOUTS))
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
    base |= {"max_bad_fraction": None, "overwrite": False, "json": False, "talks": None}
    arguments = ["shards", "write", "a.csv", "b.csv", "out"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls.pop() == ((["a.csv", "b.csv"], Path("out"), Recipe()), base)
    arguments = ["shards", "write", "k.json", "out", "--split", "train", "--images", "i", "--image-key", "f"]
    arguments += ["--caption-key", "c", "--id-key", "d", "--samples-per-shard", "5", "--max-mb", "6", "--size", "7"]
    arguments += ["--quality", "8", "--no-check", "--workers", "9", "--max-bad-fraction", "0", "--overwrite", "--json"]
    arguments += ["--talks"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    given = {"image": "f", "caption": "json:c", "id_field": "d", "images": Path("i"), "workers": 9}
    given |= {"max_bad_fraction": 0.0, "overwrite": True, "json": True, "talks": True}
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
