"""`vlm shards check` and `vlm shards preview`: what they print, their exit codes, the sheet."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from tests.tiny import members, pack, picture, settings, squares, write_config
from vlm import cli
from vlm.eval.sheet import wrap


def vlm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vlm", "shards", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    more = [("x.png", b"no picture"), ("x.txt", b"x"), ("y.png", picture("red", 31)), ("z.txt", b"z")]
    pack(tmp_path / "s.tar", [*members(16), *more, ("w.png", members(1)[0][1]), ("w.txt", b"again")])
    assert vlm(monkeypatch, "check", "s.tar") == 1
    assert capsys.readouterr().out.splitlines() == [
        "                              count  share  first",
        "errors: unusable in training",
        "  no caption                      1  5.00%  s.tar: y",
        "  no image                        1  5.00%  s.tar: z",
        "  not an image                    1  5.00%  s.tar: x",
        "notes: used all the same",
        "  duplicate picture               1  5.00%  s.tar: w",
        "3 of 20 samples in 1 shard are unusable (15.00%, limit 5.00%): too many errors",
    ]
    assert vlm(monkeypatch, "check", "s.tar", "--max-bad-fraction", "0.15", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["unusable"], found["healthy"]) == (20, 3, True)
    assert found["errors"]["not an image"] == {"count": 1, "example": "s.tar: x"}


def test_a_config_tells_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squares(tmp_path / "s.tar")
    config = write_config(tmp_path / "c.yaml", settings("decoder", tmp_path / "s.tar"))
    assert vlm(monkeypatch, "check", tmp_path / "s.tar", "--config", config, "--max-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"]["caption cut"]["count"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none.tar"], "no file matches none.tar"),
        (["check", "s.tar", "--max-tokens", "9"], "--tokenizer and --max-tokens belong together"),
        (["check", "s.tar", "--caption", "json"], "write txt, json:FIELD"),
        (["preview", "s.tar", "--out", "no/sheet.png"], "--out no/sheet.png: there is no folder no; make it first"),
        (["preview", "s.tar", "--out", "sheet.pdf"], "--out sheet.pdf: name a file that ends in .png, .jpg, .jpeg"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    squares(tmp_path / "s.tar")
    assert vlm(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert [file.name for file in tmp_path.iterdir()] == ["s.tar"]


def test_preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    squares(tmp_path / "s.tar")
    write_config(tmp_path / "c.yaml", settings("decoder", tmp_path / "s.tar"))
    assert vlm(monkeypatch, "preview", "s.tar", "--config", "c.yaml", "--texts", "1", "--count", "6") == 0
    title, head, start, image, *rest = capsys.readouterr().out.splitlines()
    assert title == "0000: a red square" and head.split() == ["token", "id", "supervised"]
    assert start.split() == ["<bos>", "1", "-"] and image.split() == [
        "<image>",
        "x",
        "5",
        "-",
    ]  # 4 patches and the class token
    assert [line.split()[-1] for line in rest[:-2]] == ["yes"] * (len(rest) - 2) and rest[-3].split()[0] == "<eos>"
    assert len({len(line) for line in (head.replace("supervised", "yes"), *rest[:-2])}) == 1
    with Image.open("sheet.png") as sheet:
        assert sheet.size[0] == 4 * 256 + 16 and sheet.size[1] > 2 * 256
    assert vlm(monkeypatch, "preview", "s.tar", "--out", "other.jpg", "--texts", "1") == 0
    assert capsys.readouterr().out.splitlines() == ["0000: a red square", "12 pictures with their captions: other.jpg"]


def test_wrap() -> None:
    font = ImageFont.load_default(15)
    lines = wrap("a long caption of many words " * 9 + "w" * 90, font, 120)
    assert len(lines) == 5 and lines[-1].endswith("…") and all(font.getlength(line) <= 120 for line in lines)
    assert wrap("w" * 40, font, 120, most=9) != ["w" * 40] and "".join(wrap("w" * 40, font, 120, most=9)) == "w" * 40
    assert wrap("short", font, 120) == ["short"]


def test_nothing_in_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "s.tar", [("/README", b"x")])
    assert vlm(monkeypatch, "check", "s.tar") == 1
    *_, note, last = capsys.readouterr().out.splitlines()
    assert note.split() == ["unsafe", "name", "1", "100.00%", "s.tar:", "/README"]
    assert last == "0 of 0 samples in 1 shard are unusable (0.00%, limit 5.00%): no sample is usable"
