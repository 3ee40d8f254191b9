"""Each fault of a source is counted or refused, with its row; nothing outside the folder is read."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.shard_files import picture
from tests.data.source_files import LAYOUTS, NAMES, folder, marked, needs_pyarrow, pictures, save, talk
from vlm.data.image import BadSample
from vlm.data.pictures import Folder
from vlm.data.sources import open_pictures


def test_rows_that_cannot_be_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = pictures(tmp_path / "data")
    rows = [b"image,caption", b"p00.png,a", b"p01.png", b"p02.png,\xff", b",b", b'p03.png,"x"y', b"p04.png,c"]
    (place / "t.csv").write_bytes(b"\n".join(rows))
    source = open_pictures(str(place / "t.csv"))
    assert [source.key(i) for i in range(len(source))] == ["p00", "p04"]
    assert source.bad == {"unreadable row": 2, "not UTF-8": 1, "no image": 1}
    assert f"unusable {place / 't.csv'}, row 2: unreadable row (1 cells, the header has 2)" in caplog.messages
    assert source.where(1) == f"{place / 't.csv'}, row 6"
    lines = ['{"image": "p00.png", "caption": "a"}', "", '{"image": ', "[1]", '{"caption": "b"}']
    (place / "t.jsonl").write_text("\n".join(lines))
    source = open_pictures(str(place / "t.jsonl"))
    assert len(source) == 1 and source.bad == {"unreadable json": 2, "no image": 1}
    assert any(message.startswith(f"unusable {place / 't.jsonl'}, row 2: unreadable") for message in caplog.messages)
    (place / "t.token").write_text("p00.png#0\ta\nno tab\n")
    assert open_pictures(str(place / "t.token")).bad == {"unreadable row": 1}


def test_too_many_unreadable_rows(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    rows = [f"p00.png,caption {i}" if i % 9 else "p00.png" for i in range(200)]
    (place / "t.csv").write_text("\n".join(["image,caption", *rows]))
    with pytest.raises(ValueError, match=r"t.csv: 23 of 200 samples are unusable \(unreadable row: 23\), more than"):
        open_pictures(str(place / "t.csv"), max_bad_fraction=0.1)


def test_missing_pictures_and_empty_captions(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    (place / "t.csv").write_text("image,caption\np00.png,a\nnone.png,b\np02.png, \np03.png,c\np03.png,\n")
    source = open_pictures(str(place / "t.csv"))
    assert source.raw(3).captions == ["c"]
    for index, reason in ((1, "no such picture"), (2, "empty caption")):
        with pytest.raises(BadSample) as caught:
            source.raw(index)
        assert caught.value.reason == reason
    assert list(source.captions()) == ["a", "b", "c"]


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    place, outside = tmp_path / "data", tmp_path / "outside"
    folder(place)
    outside.mkdir()
    (outside / "secret.png").write_bytes(picture(99))
    os.symlink(outside / "secret.png", place / "link.png")
    os.symlink(outside, place / "below")
    os.symlink(place / "p01.png", place / "inner.png")
    os.mkfifo(place / "pipe.png")
    inside = Folder(place)
    names = ("../outside/secret.png", str(outside / "secret.png"), "link.png", "below/secret.png", "/etc/passwd")
    for name in names:
        with pytest.raises(BadSample, match="picture outside the folder"):
            inside.read(name)
    assert (
        inside.read("inner.png") == inside.read(str(place / "p01.png")) == inside.read("./x/../p01.png") == picture(1)
    )
    for name, reason in {
        "pipe.png": "no such picture",
        "": "no such picture",
        "a\0b": "unreadable picture",
        "x" * 5000: "unreadable picture",
        "https://example.org/a.png": "picture is an address",
    }.items():
        with pytest.raises(BadSample) as caught:
            inside.read(name)
        assert caught.value.reason == reason
    (place / "link.txt").write_text("a link")
    os.symlink(outside / "secret.png", place / "p00.json")
    source = open_pictures(str(place))
    found = {source.where(i).rpartition(" ")[2]: i for i in range(len(source))}
    assert len(found) == 33  # the link has a caption, so it is told when it is asked for
    for name in ("link.png", "p00.png"):
        with pytest.raises(BadSample, match="picture outside the folder"):
            source.raw(found[name])


def test_coco_faults(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(NAMES[:2])]
    notes = [{"image_id": 0, "caption": "a"}, {"image_id": 9, "caption": "b"}]
    source = open_pictures(save(tmp_path / "data", {"images": images, "annotations": notes}))
    assert source.bad == {"caption of an unknown picture": 1}
    with pytest.raises(BadSample, match="no caption"):
        source.raw(1)
    boxes = {"images": images, "annotations": [{"image_id": 0, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(ValueError, match=r"annotations have no caption, only image_id, bbox; COCO's captions are in"):
        open_pictures(save(tmp_path / "data", boxes))
    with pytest.raises(ValueError, match=r"all.json#train: has no splits; only Karpathy's JSON"):
        open_pictures(save(tmp_path / "data", {"images": images, "annotations": notes}) + "#train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [1, 2], "b": "x"}, r"unknown layout: an object with a \(a list of 2\), b \(str\). Known: COCO captions"),
        ([1, 2], r"unknown layout: a list of 2. Known"),
        ([], "JSON list without an entry"),
        ([{"pixels": 1, "words": 2}], "no column for the picture; JSON list with the columns pixels, words"),
    ],
)
def test_unknown_json(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_pictures(save(tmp_path / "data", content))


def test_unknown_layouts(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    (place / "notes.md").touch()
    with pytest.raises(
        ValueError, match=r"unknown layout: no tar file directly in it, and no picture .* Found: .png \(32\), .md \(1\)"
    ):
        open_pictures(str(place))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Found: nothing"):
        open_pictures(str(tmp_path / "empty"))
    for name, content, message in (
        ("a.json", "{", "a.json: not JSON: "),
        (
            "b.json",
            "{}\n{}",
            "b.json: not JSON: Extra data.*; one object a line is read from a name that ends in .jsonl",
        ),
        ("a.jsonl", "", "a.jsonl: not JSON lines: it is empty"),
        ("b.jsonl", "[1]", "b.jsonl: not JSON lines: row 1: unreadable json"),
        ("a.csv", "", "a.csv: is empty; expected a header"),
        ("b.csv", "image,caption\n", "nothing to use"),
    ):
        (place / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            open_pictures(str(place / name))
    with pytest.raises(ValueError, match="one folder or JSON file at a time, or several files of one kind"):
        open_pictures([str(place), str(place / "b.csv")])
    with pytest.raises(ValueError, match=r"a.json and 1 more: one JSON file at a time"):
        open_pictures(str(place / "*.json"))
    with pytest.raises(ValueError, match=r"no file matches .*c.csv; that folder holds "):
        open_pictures(str(place / "c.csv"))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", pytest.param("parquet", marks=needs_pyarrow)])
def test_a_table_that_changes_is_refused(suffix: str, tmp_path: Path) -> None:
    path = Path(LAYOUTS[suffix](tmp_path / "data"))
    source = open_pictures(str(path))
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=f"all.{suffix}: changed since it was indexed"):
        source.raw(0)


DAMAGED = {**LAYOUTS, "old": lambda place: talk(place, False, False), "chat": lambda place: talk(place, True, True)}


@pytest.mark.parametrize(
    "layout",
    marked(set(DAMAGED) - {"folder", "shards", "img2dataset", "parquet bytes"}),
)
def test_damage_is_refused_or_counted_and_never_more(layout: str, tmp_path: Path) -> None:
    """Bytes changed, cut and doubled at random: a message or fewer samples, no other exception."""
    spec = DAMAGED[layout](tmp_path / "data")
    path = Path(spec.partition("#")[0])
    whole, random, opened, read = path.read_bytes(), np.random.default_rng(0), 0, 0
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(len(data), size=3).tolist():
            data[place : place + int(random.integers(4))] = random.bytes(int(random.integers(3)))
        path.write_bytes(data[: len(data) if random.random() < 0.7 else int(random.integers(len(data)))])
        try:
            source = open_pictures(spec, max_bad_fraction=1.0)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        opened += 1
        for index in range(0, len(source), 5):
            assert source.key(index) and source.where(index).startswith(str(path))
            try:
                assert source.raw(index).captions
                read += 1
            except BadSample as bad:
                assert bad.reason
    assert 0 < opened < 40 or not spec.endswith((".json", ".parquet"))
    assert read >= opened / 2


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "all.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"all.parquet: Parquet is read with pyarrow: pip install 'vlm\[parquet\]'"):
        open_pictures(str(tmp_path / "all.parquet"))


@needs_pyarrow
def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "all.parquet").write_bytes(b"<html>404</html>" * 9)
    with pytest.raises(ValueError, match=r"all\.parquet: not a Parquet file"):
        open_pictures(str(tmp_path / "all.parquet"))
