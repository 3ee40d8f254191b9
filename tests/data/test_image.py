"""Known-answer pixels for every kind of picture PIL gets wrong; transforms against timm and open_clip."""

import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from vlm.data.image import HUGE, BadSample, ImageTransform, decode


def _bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _colours(data: bytes) -> list[tuple[int, ...]]:
    image = decode(data)
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def test_16_bit_grey() -> None:
    grey = Image.fromarray(np.array([[0, 32768, 65535, 257]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert _colours(_bytes(grey, kind)) == [(0,) * 3, (128,) * 3, (255,) * 3, (1,) * 3]


def test_16_bit_grey_with_a_transparent_value() -> None:
    plain = _bytes(Image.fromarray(np.array([[0, 65535, 30000]], dtype=np.uint16)))
    chunk = b"tRNS" + struct.pack(">H", 30000)
    at = plain.index(b"IDAT") - 4
    data = plain[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[at:]
    assert _colours(data) == [(0,) * 3, (255,) * 3, (255,) * 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0.5, 1], [0, 128, 255]), ([0, 51, 255], [0, 51, 255]), ([0, 32768, 65535], [0, 128, 255])],
)
def test_float_tiff(values: list[float], expected: list[int]) -> None:
    data = _bytes(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert _colours(data) == [(v,) * 3 for v in expected]


def test_float_tiff_that_is_not_finite() -> None:
    with pytest.raises(BadSample, match="not finite"):
        decode(_bytes(Image.fromarray(np.array([[1, np.nan]], dtype=np.float32)), "TIFF"))


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert _colours(_bytes(image, "TIFF"))[0] == (255, 0, 0)
    red, green, blue = _colours(_bytes(image, "JPEG", quality=100))[0]
    assert red > 250 and green < 5 and blue < 5


def test_alpha_is_composited_on_white() -> None:
    hidden = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], dtype=np.uint8), "RGBA")
    expected = [(255, 255, 255), (255, 0, 0), (204, 204, 204)]
    assert _colours(_bytes(hidden)) == expected
    assert _colours(_bytes(hidden, "WEBP", lossless=True, exact=True)) == expected
    grey = Image.fromarray(np.array([[[0, 0], [0, 255], [100, 255]]], dtype=np.uint8), "LA")
    assert _colours(_bytes(grey)) == [(255,) * 3, (0,) * 3, (100,) * 3]


def test_palettes() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert _colours(_bytes(image)) == [(255, 0, 0), (0, 0, 255)]
    assert _colours(_bytes(image, transparency=0)) == [(255, 255, 255), (0, 0, 255)]
    assert _colours(_bytes(image, transparency=bytes([255, 0]))) == [(255, 0, 0), (255, 255, 255)]


def test_colour_key_and_two_tones() -> None:
    image = Image.fromarray(np.array([[[9, 9, 9], [0, 255, 0]]], dtype=np.uint8))
    assert _colours(_bytes(image, transparency=(9, 9, 9))) == [(255, 255, 255), (0, 255, 0)]
    assert _colours(_bytes(Image.fromarray(np.array([[True, False]])))) == [(255,) * 3, (0,) * 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24] = 255  # bright top left
    upright[16:, :24] = 120
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert np.abs(np.asarray(decode(data)).astype(int) - upright).max() < 30


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored() -> None:
    data = _bytes(Image.new("RGB", (16, 16), "red"), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert _colours(data)[0] == (255, 0, 0)


def test_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert set(_colours(data)) == {(255, 0, 0)}


def _header(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + _IDAT


_IDAT = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image file"),
        (b"just text, named .jpg", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (_header(60000, 60000), "too many pixels"),
        (_header(9000, 9000), "too many pixels"),
        (_header(1, 5000), "extreme aspect ratio"),
        (_header(100, 100), "corrupt image"),
        (_bytes(_picture(64, 64), "JPEG")[:-400], "corrupt image"),
        (_bytes(_picture(64, 64), "PNG")[:-400], "corrupt image"),
        (_bytes(_picture(64, 64), "WEBP")[:-100], "corrupt image"),
    ],
)
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_pixel_limit_is_the_callers() -> None:
    data = _bytes(Image.new("RGB", (100, 100)))
    assert decode(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(BadSample, match=r"too many pixels .100 x 100, at most 9999"):
        decode(data, max_pixels=9_999)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL says what it finds wrong in TIFF tags
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]), st.integers(0, 2**32 - 1))
def test_mutated_files_give_an_image_or_bad_sample(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(_bytes(_picture(17, 13), kind))
    for place in random.integers(0, len(data), random.integers(1, 8)):
        data[place] = random.integers(256)
    try:
        assert decode(bytes(data)).mode == "RGB"
    except BadSample as bad:
        assert bad.reason in ("not an image", "corrupt image", "too many pixels", "extreme aspect ratio")


SIZES = [(64, 64), (224, 224), (300, 200), (201, 333), (37, 500), (1000, 60), (223, 225)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("model", "crop"),
    [("test_vit", 1.0), ("test_vit", None), ("tf_efficientnet_lite0", None), ("test_resnet", None), ("test_vit", 0.9)],
)
def test_equals_timm(model: str, crop: float | None, size: tuple[int, int]) -> None:
    config: dict[str, Any] = resolve_model_data_config(timm.create_model(model), {"crop_pct": crop} if crop else {})
    ours = ImageTransform(
        size=config["input_size"][1:],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop_fraction=config["crop_pct"],
    )
    _assert_equal(ours, create_transform(**config, is_training=False), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96)])
@pytest.mark.parametrize(("mode", "resize"), [("squash", "squash"), ("border", "longest"), ("center", "shortest")])
def test_equals_timm_crop_modes(
    mode: str, resize: Any, shape: tuple[int, int], crop: float, size: tuple[int, int]
) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    theirs = create_transform((3, *shape), crop_mode=mode, crop_pct=crop, mean=mean, std=std, interpolation="bicubic")
    fill = (round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2]))
    _assert_equal(ImageTransform(shape, mean, std, resize=resize, crop_fraction=crop, fill=fill), theirs, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("shape", [(224, 224), (96, 160)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clip(interpolation: Any, shape: tuple[int, int], resize: Any, size: tuple[int, int]) -> None:
    if resize == "shortest" and shape[0] != shape[1]:
        interpolation = "bicubic"  # open_clip ignores the setting there
    theirs = image_transform(shape, is_train=False, resize_mode=resize, interpolation=interpolation)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    _assert_equal(ImageTransform(shape, mean, std, resize=resize, interpolation=interpolation), theirs, size)


def _assert_equal(ours: ImageTransform, theirs: Any, size: tuple[int, int]) -> None:
    image = _picture(*size)
    expected = theirs(image)
    assert ours(image).shape == expected.shape == (3, *ours.size)
    levels = _levels(ours, ours(image), expected)
    assert levels.max() <= 2.001 and (levels > 1.001).float().mean() <= 1e-3 and levels.mean() <= 0.2  # rounding


def _levels(transform: ImageTransform, mine: Tensor, theirs: Tensor) -> Tensor:
    """Differences in levels of 255."""
    return ((mine - theirs) * torch.tensor(transform.std).view(3, 1, 1) * 255).abs()


def test_a_photograph_s_pixels_are_open_clip_s_to_a_hundredth_of_a_level() -> None:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    ours, theirs = ImageTransform((224, 224), mean, std), image_transform((224, 224), is_train=False)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    expected = theirs(Image.open(io.BytesIO(file.getvalue())))
    found = ours.normalize(ours.read(file.getvalue()))
    assert _levels(ours, found, expected).mean() <= 0.01
    scaled = replace(ours, scaled=1)
    quick = scaled.normalize(scaled.read(file.getvalue()))
    assert 0.01 < _levels(ours, quick, expected).mean() <= 2
    assert decode(file.getvalue(), least=lambda width, height: 224).size == (320, 240)
    assert decode(file.getvalue(), least=lambda width, height: 300).size == (640, 480)


def test_normalize_leaves_its_input_and_takes_batches() -> None:
    transform = ImageTransform((4, 4), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    before, floats = pixels.clone(), pixels.float()
    assert torch.equal(transform.normalize(pixels), transform.normalize(floats))
    assert torch.equal(pixels, before) and torch.equal(floats, before.float())
    expected = (pixels[1, 2, 0, 0].item() / 255 - 0.3) / 0.4
    assert transform.normalize(pixels)[1, 2, 0, 0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [2, 30])
def test_normalized_batches_of_any_size_are_their_pictures(count: int) -> None:
    transform = ImageTransform((224, 224), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    found = transform.normalize(pixels)
    assert (4 * pixels.numel() >= HUGE) == (count == 30) and found.is_contiguous()
    mean, std = torch.tensor(transform.mean).view(3, 1, 1), torch.tensor(transform.std).view(3, 1, 1)
    assert torch.allclose(found, (pixels / 255 - mean) / std, rtol=0, atol=1e-6)
    again = transform.normalize(pixels)
    found.zero_()  # memory of its own
    assert torch.equal(again[0], transform.normalize(pixels[0]))


def test_padded_pictures_are_squares_before_they_are_resized() -> None:
    nothing, all_of_it = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    transform = ImageTransform((4, 4), nothing, all_of_it, "padded", "bilinear", fill=(9, 8, 7))
    pixels = transform.pixels(Image.new("RGB", (8, 1), (201, 104, 47)))  # three rows above, four below
    assert pixels[:, 0].T.tolist() == [[9, 8, 7]] * 4
    blended = [fill + 3 * (colour - fill) / 8 for fill, colour in zip((9, 8, 7), (201, 104, 47), strict=True)]
    assert pixels[:, 1, 1].tolist() == [pytest.approx(value, abs=1) for value in blended]
    assert transform.pixels(Image.new("RGB", (5, 5), (200, 100, 50))).unique().tolist() == [50, 100, 200]


def test_the_square_around_a_sliver_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ImageTransform((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resize="padded")
    sliver = Image.new("RGB", (20, 200), (200, 100, 50))
    whole = transform.pixels(sliver)
    monkeypatch.setattr("vlm.data.image.LARGEST", 100)
    assert (transform.pixels(sliver).float() - whole).abs().max() <= 30  # only at the edge
    assert transform.pixels(sliver)[:, 4, 4].tolist() == whole[:, 4, 4].tolist()


@pytest.mark.parametrize(("floored", "left"), [(False, 2), (True, 1)])
def test_a_middle_between_two_pixels(floored: bool, left: int) -> None:
    columns = np.tile(np.arange(7, dtype=np.uint8)[None, :, None], (4, 1, 3))
    transform = ImageTransform((4, 4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), floored=floored)
    assert transform.pixels(Image.fromarray(columns))[0, 0].tolist() == list(range(left, left + 4))
