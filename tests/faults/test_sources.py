"""Sources that cannot be read, on the real command line: one message, the exit code, nothing half-written."""

from pathlib import Path

import pytest

from tests.command import Commands
from tests.tiny import picture, settings, squares, write_config


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folders with and without captions, tables, shards, and a config."""
    for name in ("good", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture("red"))
    (tmp_path / "good" / "a.txt").write_text("a red square")
    (tmp_path / "bare" / "list.csv").write_text("image,caption\na.png,a red square\n")
    (tmp_path / "odd.csv").write_text("x,y\n1,2\n")
    (tmp_path / "odd.json").write_text('{"pictures": [1, 2]}')
    (tmp_path / "gone.csv").write_text("image,caption\nb.png,words\n")
    squares(tmp_path / "squares.tar")
    write_config(tmp_path / "clip.yaml", settings("clip", Path("squares.tar")))
    return tmp_path


TABLES = ".csv, .tsv, .jsonl, .ndjson, .json, .parquet, .txt, .token"
FAULTS = {
    "bare": "bare: an unknown layout: no tar file directly in it, and no picture (.jpg, IMAGES) with a .txt or .json "
    "file of its name beside it. Found: .png (1), .csv (1). "
    f"Where captions stand in a table ({TABLES}), name that file",
    "odd.csv": "odd.csv: no column for the picture; CSV with the columns x, y; name the right one "
    "(--image-key, data.image)",
    "odd.json": "odd.json: an unknown layout: an object with pictures (a list of 2). Known: COCO captions (images and "
    "annotations with caption), Karpathy's (images with sentences), LLaVA's (a list with conversations or messages), "
    "a list of objects",
    "gone.csv": "gone.csv: CSV; picture: 'image', captions: 'caption'; 1 pictures. None of 1 tried is usable: no such "
    "picture (b.png in .); pictures are looked for in . (--images, data.images)",
    "none.csv": "shards 'none.csv': no file matches none.csv; that folder holds gone.csv, odd.csv",
}


@pytest.mark.parametrize("source", FAULTS)
@pytest.mark.parametrize("verb", ["train", "write"])
def test_what_is_no_source(vlm: Commands, place: Path, verb: str, source: str) -> None:
    train = verb == "train"
    arguments = ["train", "clip.yaml", f"data.train={source}"] if train else ["shards", "write", source, "out"]
    before = sorted(place.rglob("*"))
    done = vlm(*arguments, folder=place)
    message = FAULTS[source].replace(
        "IMAGES", ".png, .jpeg, .webp" if train else ".jpeg, .png, .webp, .gif, .bmp, .tif, .tiff"
    )
    assert (done.code, done.out, done.err.strip()) == (2, "", f"vlm: {message}")
    assert sorted(place.rglob("*")) == before


def test_written_trained_and_refused(vlm: Commands, place: Path) -> None:
    done = vlm("shards", "write", "squares.tar", "out", "--samples-per-shard", 6, folder=place)
    assert (done.code, done.err) == (0, "squares.tar: tar shards; 16 pictures\n")
    assert done.out.startswith("out: 16 pictures with 16 captions in 3 shards, 0.1 MB; ")
    assert vlm("train", "clip.yaml", "data.train=out", folder=place).code == 0
    done = vlm("shards", "write", "good", "out", folder=place)
    assert (done.code, done.out) == (2, "")
    assert done.err == "vlm: out: exists already; choose another folder, or --overwrite it\n"
    assert vlm("shards", "write", "good", "out", "--overwrite", folder=place).code == 0
    assert sorted(path.name for path in (place / "out").iterdir()) == ["000000.tar", "index.json", "sizes.json"]
