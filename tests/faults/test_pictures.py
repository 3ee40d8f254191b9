"""Pictures that cannot be used, and pictures that are only unusual: the exact report of each.

`make test-faults` mutates 100,000 pictures; the ordinary suite fewer.
"""

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.made import counted, encoded, good, tar, trained
from vlm.data.check import Patience
from vlm.data.image import BadSample, decode

PICTURES = int(os.environ.get("VLM_TEST_PICTURES", "4000"))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image file"),
        (b"just text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (saved(NOISE, "PPM"), "not an image"),
        (saved(NOISE, "JPEG")[:-300], "corrupt image"),
        (saved(NOISE, "PNG")[:-300], "corrupt image"),
        (encoded("red", size=(8000, 8000)), "too many pixels"),
        (encoded("red", size=(1, 900)), "extreme aspect ratio"),
    ],
)
def test_unusable(data: bytes, reason: str, tmp_path: Path) -> None:
    file = tar(tmp_path / "s.tar", [*good(), ("x.jpg", data), ("x.txt", b"x")])
    assert counted(file) == (3, {reason: 1}, {})
    assert trained(file) == {reason: 1}


def test_too_small_only_when_asked_for(tmp_path: Path) -> None:
    file = tar(tmp_path / "s.tar", [*good(), ("x.png", encoded("red", size=(40, 20))), ("x.txt", b"x")])
    assert counted(file) == (3, {}, {})
    assert counted(file, patience=Patience(min_side=20)) == (3, {"too small": 2}, {})
    assert counted(file, patience=Patience(min_side=21)) == (3, {"too small": 3}, {})
    assert counted(file, patience=Patience(max_pixels=799)) == (3, {"too many pixels": 1}, {})


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(NOISE, "JPEG", exif=exif)


def _deep() -> bytes:
    return saved(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)))


@pytest.mark.parametrize(
    ("data", "notes"),
    [
        (encoded(7, mode="L"), ["grey"]),
        (encoded(1, mode="1"), ["grey"]),
        (encoded((7, 9), mode="LA"), ["grey", "alpha"]),
        (encoded(1, mode="P"), ["palette"]),
        (encoded((1, 2, 3, 4), "JPEG", "CMYK"), ["CMYK"]),
        (encoded((1, 2, 3, 4), mode="RGBA"), ["alpha"]),
        (_deep(), ["grey", "16 bit"]),
        (encoded(0.5, "TIFF", "F"), ["grey", "float"]),
        (_turned(), ["turned by EXIF"]),
        (saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]), ["animated"]),
        (saved(NOISE, "JPEG"), []),
    ],
)
def test_unusual(data: bytes, notes: list[str], tmp_path: Path) -> None:
    file = tar(tmp_path / "s.tar", [*good(), ("x.jpg", data), ("x.txt", b"x")])
    assert counted(file) == (3, {}, dict.fromkeys(notes, 1))
    assert trained(file) == {}


def test_16_bits_of_colour_are_seen(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 32896, 65535))
    chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in chunks
    )
    assert np.asarray(decode(data)).tolist() == [[[255, 0, 0], [0, 128, 255]]]
    file = tar(tmp_path / "s.tar", [*good(), ("x.png", data), ("x.txt", b"x")])
    assert counted(file) == (3, {}, {"16 bit": 1})


def test_exact_duplicates(tmp_path: Path) -> None:
    same = [(f"x{i}.{suffix}", data) for i in range(3) for suffix, data in (("png", encoded("red")), ("txt", b"x"))]
    files = [
        tar(tmp_path / "a.tar", [*good(), *same]),
        tar(tmp_path / "b.tar", [("y.png", encoded("red")), ("y.txt", b"x")]),
    ]
    assert counted(*files) == (6, {}, {"duplicate picture": 3})


@pytest.mark.filterwarnings("ignore:Image size")  # PIL warns where decode refuses
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL says what it finds wrong in TIFF tags
def test_mutated_pictures_give_a_picture_or_bad_sample() -> None:
    kinds = [saved(NOISE, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    draw, refused = random.Random(0), 0
    for number in range(PICTURES):
        data = bytearray(kinds[number % len(kinds)])
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        try:
            assert decode(bytes(data)).mode == "RGB"
        except BadSample:
            refused += 1
    assert 0.2 < refused / PICTURES < 0.9


def test_a_text_chunk_that_would_unpack_to_200_mb_is_refused() -> None:
    plain, body = encoded("red"), b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    at = plain.index(b"IDAT") - 4
    tracemalloc.start()
    try:
        assert decode(plain[:at] + chunk + plain[at:]).getpixel((0, 0)) == (255, 0, 0)
    except BadSample as bad:
        assert bad.reason == "corrupt image"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20


def _bombs() -> dict[str, tuple[bytes, str]]:
    """Few bytes that would unpack to many, and why they are refused."""
    png, gif, bmp = (bytearray(encoded("red", kind)) for kind in ("PNG", "GIF", "BMP"))
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    return {
        "png header": (bytes(png), "too many pixels"),
        "gif header": (bytes(gif), "too many pixels"),
        "bmp header": (bytes(bmp), "too many pixels"),
        "13000 x 13000": (saved(Image.new("1", (13000, 13000))), "too many pixels"),
        "1 x 5000": (encoded("red", size=(1, 5000)), "extreme aspect ratio"),
    }


_BOMB = """
import resource, sys
from vlm.data.image import BadSample, decode
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(data)
except BadSample as bad:
    print(bad.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["png header", "gif header", "bmp header", "13000 x 13000", "1 x 5000"])
def test_a_bomb_is_refused_from_its_header(name: str) -> None:
    """In a process of its own, whose memory hardly grows."""
    data, expected = _bombs()[name]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _BOMB], input=data, capture_output=True, check=True)
    reason, _, grown = done.stdout.decode().strip().rpartition(" ")
    assert reason == expected
    assert int(grown) * (1 if sys.platform == "darwin" else 1024) < 50 * 2**20
