"""A run reads pictures from whatever holds them, and learns the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import COLOURS, picture, read, records, settings, squares, write_config
from vlm.data.write import Recipe, write
from vlm.eval.run import retrieval
from vlm.restore import restore
from vlm.train.run import train_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares as a shard, as a folder, and as a table beside it."""
    place = tmp_path_factory.mktemp("data")
    squares(place / "squares.tar")
    (place / "folder").mkdir()
    rows = []
    for i in range(16):
        colour = COLOURS[i % 8]
        (place / "folder" / f"{i:04d}.png").write_bytes(picture(colour, shift=i // 8))
        (place / "folder" / f"{i:04d}.txt").write_text(f"a {colour} square")
        rows.append(json.dumps({"file": f"{i:04d}.png", "said": f"a {colour} square"}))
    (place / "table.jsonl").write_text("\n".join(rows))
    write([str(place / "folder")], place / "written", Recipe(samples=5))
    return place


def trained(place: Path, out: Path, train: Path, *overrides: str) -> list[dict[str, Any]]:
    config = write_config(out.with_suffix(".yaml"), settings("clip", train))
    train_run(read(config, f"data.val={train}", "train.eval_every=2", *overrides), out)
    return records(out)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("folder", ["data.workers=1"]),
        ("table.jsonl", ["data.images=PLACE/folder", "data.image=file;png", "data.caption=txt;json:said"]),
        ("written", []),
    ],
)
def test_what_holds_the_pictures_makes_no_difference(
    place: Path, tmp_path: Path, name: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.replace("PLACE", str(place)) for text in overrides]
    expected = trained(place, tmp_path / "shard", place / "squares.tar")
    assert sum("val/loss_itc" in line for line in expected) == 2 and len(expected) == 6
    capsys.readouterr()
    assert trained(place, tmp_path / "other", place / name, *given) == expected
    assert (f"{place / name}: " in capsys.readouterr().err) == (name != "written")
    run = restore(tmp_path / "other")
    assert retrieval(run, [str(place / name)]) == retrieval(run, [str(place / "squares.tar")], caption="txt")
