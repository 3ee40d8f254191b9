"""Shards that are lost, empty, something else, flipped, changed or too few: refused or counted, never mixed up."""

import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import Commands
from tests.faults.made import counted, encoded, tar
from tests.tiny import settings, squares, write_config
from vlm.data.image import BadSample, decode
from vlm.data.shards import Shards
from vlm.data.write import Recipe, write

FLIPS = int(os.environ.get("VLM_TEST_DAMAGES", "60"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    squares(tmp_path / "squares.tar")
    write_config(tmp_path / "c.yaml", settings("clip", Path("squares.tar")))
    return tmp_path


NO_TAR = "is not a tar file, or its very beginning is damaged; fetch or write it anew"
NO_SAMPLE = "no sample has both picture and caption"
NONE_USED = f"the 0 samples before that are used\nbad.tar: {NO_SAMPLE}"


NOTHING = {
    "empty": (b"", f"bad.tar: {NO_TAR} (empty file); {NONE_USED}"),
    "html": (b"<!DOCTYPE html><title>404</title>" * 99, f"bad.tar: {NO_TAR} (invalid header); {NONE_USED}"),
    "gzip": (
        b"\x1f\x8b\x08" + bytes(2000),
        "bad.tar: is compressed, which allows no random access; unpack it to a plain .tar",
    ),
    "zeros": (
        bytes(10240),
        f"bad.tar: {NO_SAMPLE}. Wanted image='IMAGES', caption='txt;json:caption'; suffixes found: no members at all",
    ),
    "missing": (None, "shards 'bad.tar': no file matches bad.tar; that folder holds squares.tar"),
}


@pytest.mark.parametrize("fault", NOTHING)
@pytest.mark.parametrize("verb", [("train", "c.yaml", "data.train=bad.tar"), ("shards", "write", "bad.tar", "out")])
def test_what_is_no_shard_is_refused_at_the_start(
    vlm: Commands, place: Path, verb: tuple[str, ...], fault: str
) -> None:
    data, message = NOTHING[fault]
    images = "jpg;png;jpeg;webp" if verb[0] == "train" else "jpg;jpeg;png;webp;gif;bmp;tif;tiff"
    if data is not None:
        (place / "bad.tar").write_bytes(data)
    before = sorted(place.rglob("*"))
    done = vlm(*verb, folder=place)
    assert (done.code, done.out, done.err) == (2, "", f"vlm: {message.replace('IMAGES', images)}\n")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_one_lost_shard_of_three_is_named(vlm: Commands, place: Path, lost: int) -> None:
    for i in {0, 1, 2} - {lost}:
        squares(place / f"s{i}.tar", 4, f"{i}-")
    done = vlm("train", "c.yaml", "data.train=s{0..2}.tar", folder=place)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"vlm: shards 's{{0..2}}.tar': no file matches s{lost}.tar; that folder holds s")


def test_a_batch_of_more_than_there_is(vlm: Commands, place: Path) -> None:
    done = vlm("train", "c.yaml", "train.batch_size=17", folder=place)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == "vlm: batch_size=17 exceeds the 16 usable samples; make it smaller"
    assert sorted(path.name for path in place.iterdir()) == ["c.yaml", "squares.tar"]


@pytest.mark.parametrize("way", ["longer", "touched", "shorter", "gone"])
def test_a_shard_that_changes_while_it_is_used(place: Path, way: str) -> None:
    file = place / "squares.tar"
    shards = Shards(str(file))
    if way == "longer":
        with file.open("ab") as end:
            end.write(b"\0")
    elif way == "touched":
        os.utime(file, ns=(1, 1))
    elif way == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        shards.raw(0)
    expected = f"{file}: changed since it was indexed; start again, and leave shards alone meanwhile"
    assert str(refusal.value) == (expected if way != "gone" else f"[Errno 2] No such file or directory: '{file}'")


def numbered(count: int) -> list[tuple[str, bytes]]:
    """Pictures whose colour and caption say the number of their sample."""
    found = []
    for i in range(count):
        found += [(f"k{i}.png", encoded((10 * i + 5, 7, 7))), (f"k{i}.txt", b"%d" % i)]
    return found


def test_a_flipped_bit_in_a_header_never_mixes_samples(tmp_path: Path) -> None:
    """Whatever bit of a header: what is read is right, and what is missing is told."""
    whole, draw = tar(tmp_path / "s.tar", numbered(6)).read_bytes(), random.Random(0)
    with tarfile.open(tmp_path / "s.tar") as opened:
        headers = [member.offset for member in opened]
    for _ in range(4 * FLIPS):
        data = bytearray(whole)
        place = draw.choice(headers) + draw.randrange(512)
        data[place] ^= 1 << draw.randrange(8)
        (tmp_path / "s.tar").write_bytes(data)
        try:
            shards = Shards(str(tmp_path / "s.tar"), max_bad_fraction=1.0)
        except ValueError as refusal:
            assert NO_TAR in str(refusal) or NO_SAMPLE in str(refusal), place
            continue
        for i in range(len(shards)):
            raw = shards.raw(i)
            assert raw.captions == [raw.key.removeprefix("k")], place
            assert decode(raw.image).getpixel((0, 0)) == (10 * int(raw.captions[0]) + 5, 7, 7), place
        assert len(shards) == 6 or shards.bad.total() > 0, place


def noise(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def test_a_flipped_bit_of_a_png_is_a_bad_sample_or_changes_nothing() -> None:
    """PNG has sums of its own; those of JPEG pictures and of captions are told by `vlm shards check` (index.json)."""
    data, draw, noticed = noise("PNG"), random.Random(0), 0
    right = np.asarray(decode(data))
    for _ in range(5 * FLIPS):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            assert np.array_equal(np.asarray(decode(bytes(flipped))), right)
        except BadSample as bad:
            assert bad.reason in ("corrupt image", "not an image", "too many pixels", "extreme aspect ratio")
            noticed += 1
    assert noticed > 4.5 * FLIPS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"features": 3}', None),
        ('{"features": {"tokens": 4}}', None),
    ],
)
def test_an_index_of_features_that_is_damaged(vlm: Commands, place: Path, text: str, message: str | None) -> None:
    (place / "kept").mkdir()
    squares(place / "kept" / "000000.tar")
    (place / "kept" / "index.json").write_text(text)
    done = vlm("train", "c.yaml", "data.train=kept", folder=place)
    assert (done.code, done.out) == (2, "") and done.err.startswith(f"vlm: kept/index.json: damaged ({message or ''}")
    assert done.err.endswith("); write the shards anew\n")


def test_whatever_bit_of_a_written_shard_is_flipped_the_doctor_sees_it(tmp_path: Path) -> None:
    """By its sum in index.json: also one of a caption, of a JPEG picture, of what lies between members."""
    tar(tmp_path / "s.tar", numbered(4))
    write([str(tmp_path / "s.tar")], tmp_path / "out", Recipe())
    file = tmp_path / "out" / "000000.tar"
    assert counted(file) == (4, {}, {})
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(FLIPS):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        try:
            assert sum(counted(file)[1].get(reason, 0) for reason in ("damaged shard", "changed shard")) == 1, place
        except ValueError as refusal:
            assert "is compressed" in str(refusal)
    file.write_bytes(whole.replace(b"3\0\0\0\0", b"4\0\0\0\0"))
    assert counted(file) == (5, {"changed shard": 1}, {})
