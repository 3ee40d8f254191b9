"""The shard doctor: one hand-made shard per fault and the exact report; the preview shows what is learned."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.command import Commands, commands
from tests.tiny import pack, picture, settings, squares, write_config
from vlm.data.check import Report, Rules, check, healthy
from vlm.data.shards import Shards
from vlm.data.text import train_bpe
from vlm.eval.preview import sheet

GOOD = [("a.png", picture("red", 40)), ("a.txt", b"a red square"), ("b.png", picture("blue", 40)), ("b.txt", b"blue")]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with commands(tmp_path_factory.mktemp("commands")) as runner:
        yield runner


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (50, 40), "red"), "JPEG", exif=exif)


def moving() -> bytes:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


BOMB = encoded(Image.new("1", (8000, 8000)))
FAULTS: dict[str, tuple[list[tuple[str, bytes]], dict[str, int], int]] = {
    "nothing": ([], {}, 0),
    "no caption": ([("c.png", picture("red", 41))], {"no caption": 1}, 1),
    "empty caption": ([("c.png", picture("red", 41)), ("c.txt", b" \n\n")], {"empty caption": 1}, 1),
    "not UTF-8": ([("c.png", picture("red", 41)), ("c.txt", b"caf\xe9")], {"not UTF-8": 1}, 1),
    "no picture": ([("c.txt", b"c")], {"no image": 1}, 1),
    "no image file": ([("c.png", b"<html>"), ("c.txt", b"c")], {"not an image": 1}, 1),
    "cut picture": ([("c.png", picture("red", 41)[:90]), ("c.txt", b"c")], {"corrupt image": 1}, 1),
    "bomb": ([("c.png", BOMB), ("c.txt", b"c")], {"too many pixels": 1}, 1),
    "sliver": ([("c.png", encoded(Image.new("L", (1000, 2)))), ("c.txt", b"c")], {"extreme aspect ratio": 1}, 1),
    "bad json": ([("c.png", picture("red", 41)), ("c.json", b"{")], {"unreadable json": 1}, 1),
    "members apart": (
        [("c.png", picture("red", 41)), ("d.png", picture("red", 42)), ("c.txt", b"c"), ("d.txt", b"d")],
        {"no caption": 2, "no image": 2, "members apart or repeated": 2, "repeated key": 2},
        4,
    ),
    "repeated key": ([("x/a.png", picture("red", 41)), ("x/a.txt", b"a")] * 2, {"members apart or repeated": 2}, 0),
}
NOTES = {
    "grey": (encoded(Image.new("L", (40, 40))), "grey picture, made RGB"),
    "palette": (encoded(Image.new("P", (40, 40))), "palette picture, made RGB"),
    "alpha": (encoded(Image.new("RGBA", (40, 40))), "alpha picture, made RGB"),
    "CMYK": (encoded(Image.new("CMYK", (40, 40)), "JPEG"), "CMYK picture, made RGB"),
    "16 bit": (encoded(Image.new("I;16", (40, 40))), "16 bit or float picture, made RGB"),
    "EXIF": (turned(), "turned by EXIF"),
    "animated": (moving(), "animated, first frame used"),
    "small": (encoded(Image.new("RGB", (40, 31))), "side below 32 pixels"),
    "again": (GOOD[0][1], "the same picture again"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_counted_and_nothing_else(name: str, tmp_path: Path) -> None:
    members, expected, unusable = FAULTS[name]
    report = check(str(pack(tmp_path / "s.tar", GOOD + members)))
    assert (dict(report.errors), report.unusable) == (expected, unusable)
    assert report.notes == Counter()
    assert set(report.first) == set(expected)
    assert healthy(report, 0.05) == (not expected)


@pytest.mark.parametrize("name", NOTES)
def test_what_is_odd_is_noted_and_usable(name: str, tmp_path: Path) -> None:
    data, reason = NOTES[name]
    report = check(str(pack(tmp_path / "s.tar", [*GOOD, ("c.png", data), ("c.txt", b"c")])))
    assert (report.errors, report.notes, report.unusable) == (Counter(), Counter({reason: 1}), 0)


def test_names_and_kinds_of_members(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        odd = [("../out.png", picture("red", 45)), ("../out.txt", b"out"), ("p.v2.png", b"x"), ("q.pkl", b"x")]
        for name, data in [*GOOD, *odd]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = check(str(path))
    assert report.notes == {
        "link, passed over": 2,
        "device or other special file, passed over": 1,
        "name leads out of its folder": 2,
        "dots in the name, which ends at the first": 1,
        "pickle, never read": 1,
    }
    assert report.errors == {"no image": 2}
    assert report.first["no image"].endswith("p (has v2.png)")
    assert not (tmp_path.parent / "out.png").exists()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """R6: a shard cut anywhere before its end mark, in steps of 64 bytes."""
    whole = pack(tmp_path / "whole.tar", GOOD).read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for length in range(1024, end, 64):
        cut.write_bytes(whole[:length])
        report = check(str(cut))
        assert report.errors["damaged shard"] == 1, length
        assert report.samples - report.unusable <= 2


def test_keys_of_other_shards_and_long_captions(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", GOOD)
    pack(tmp_path / "1.tar", [("a.png", picture("green", 50)), ("a.txt", b"a " * 40)])
    rules = Rules(tokenizer=train_bpe(["a red square", "blue"], 270), max_tokens=20)
    report = check(str(tmp_path), rules)
    assert report.errors == {"repeated key": 1} and "1.tar: sample at byte" in report.first["repeated key"]
    assert report.notes["caption of more than 20 tokens, cut"] == 1
    assert not healthy(report, 1.0)
    assert not healthy(Report(), 1.0)


def test_the_doctor_counts_what_training_counts(tmp_path: Path) -> None:
    members = [member for name in ("no caption", "no picture") for member in FAULTS[name][0]]
    renamed = [(f"{i}{name}", data) for i, (name, data) in enumerate(members)]
    path = str(pack(tmp_path / "s.tar", GOOD + renamed))
    assert Shards(path, max_bad_fraction=1.0).bad == check(path).errors == {"no caption": 1, "no image": 1}


def test_the_verb(vlm: Commands, tmp_path: Path) -> None:
    squares(tmp_path / "good.tar")
    done = vlm("shards", "check", "good.tar", folder=tmp_path)
    assert done.code == 0
    assert done.out == "16 samples in 1 shards, 0 of them unusable\nerrors: none\nnotes: none\n"
    pack(tmp_path / "bad.tar", GOOD + FAULTS["bomb"][0])
    done = vlm("shards", "check", "bad.tar", "--json", folder=tmp_path)
    assert done.code == 1
    assert json.loads(done.out)["errors"] == {"too many pixels": 1}
    assert vlm("shards", "check", "bad.tar", "--max-bad-fraction", "0.5", folder=tmp_path).code == 0
    done = vlm("shards", "check", "none.tar", folder=tmp_path)
    assert done.code == 2 and "no file matches none.tar; that folder holds" in done.err


def test_the_preview(vlm: Commands, tmp_path: Path) -> None:
    squares(tmp_path / "squares.tar")
    write_config(tmp_path / "decoder.yaml", settings("decoder", Path("squares.tar")))
    arguments = ("--config", "decoder.yaml", "--count", "2", "--every", "3", "--out", "sheet.png")
    done = vlm("shards", "preview", "squares.tar", *arguments, folder=tmp_path)
    assert done.code == 0, done.err
    first, second, last = done.out.split("\n\n")
    assert first.splitlines()[0] == "0000" and second.splitlines()[0] == "0003"
    table = [line.split() for line in first.splitlines()[3:]]
    assert table[0][::2] == ["<bos>", "-"] and table[1] == ["<image>", "x", "5", "-"]
    assert all(row[-1] == "yes" for row in table[2:]) and table[-1][0] == "<eos>"
    assert last.strip() == "pictures with captions: sheet.png"
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.width > 2 * 224 and page.getpixel((12 + 112, 12 + 112)) == (255, 0, 0)
    done = vlm("shards", "preview", "squares.tar", "--count", "1", folder=tmp_path)
    assert done.out == "0000\n  a red square\n"


def test_a_sheet_has_a_row_for_every_four() -> None:
    two, five = (sheet([(picture("red"), "a red square " * 30)] * count) for count in (2, 5))
    assert five.width > two.width and five.height > 1.9 * (two.height - 12)
