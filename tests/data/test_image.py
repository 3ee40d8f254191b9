"""Known-answer pixels for every kind of picture PIL gets wrong; transforms against timm and open_clip; augmentation."""

import io
import math
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
from torch.nn import functional

from vlm.data.image import Augment, BadSample, ImageTransform, affine, decode, resample, turn_hue


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
    scaled = replace(ours, scaled=True)
    quick = scaled.normalize(scaled.read(file.getvalue()))
    assert 0.01 < _levels(ours, quick, expected).mean() <= 2
    assert decode(file.getvalue(), least=224).size == (320, 240)
    assert decode(file.getvalue(), least=300).size == (640, 480)


def test_normalize_leaves_its_input_and_takes_batches() -> None:
    transform = ImageTransform((4, 4), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    before, floats = pixels.clone(), pixels.float()
    assert torch.equal(transform.normalize(pixels), transform.normalize(floats))
    assert torch.equal(pixels, before) and torch.equal(floats, before.float())
    expected = (pixels[1, 2, 0, 0].item() / 255 - 0.3) / 0.4
    assert transform.normalize(pixels)[1, 2, 0, 0].item() == pytest.approx(expected, abs=1e-6)


# --- augmentation ----------------------------------------------------------------------------------------------------

ALL = Augment(
    scale=(0.5, 1.2),
    ratio=0.3,
    flip=True,
    rotate=15.0,
    shift=0.1,
    brightness=0.3,
    contrast=0.3,
    saturation=0.5,
    hue=0.1,
)
MORE = Augment(mix=0.3, grey=0.3, invert=0.2, erase=0.5)


def _batch(count: int = 64, size: tuple[int, int] = (12, 16)) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def _apply(augment: Augment, pixels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return augment(pixels, torch.Generator().manual_seed(seed))


def test_everything_off_changes_nothing() -> None:
    assert torch.equal(_apply(Augment(), _batch()), _batch().float())


@pytest.mark.parametrize("augment", [ALL, MORE])
def test_a_function_of_the_generator(augment: Augment) -> None:
    pixels = _batch()
    first = _apply(augment, pixels)
    assert torch.equal(first, _apply(augment, pixels)) and not torch.equal(first, _apply(augment, pixels, seed=1))
    assert first.min() >= 0 and first.max() <= 255 and torch.equal(pixels, _batch())


def test_draws_do_not_depend_on_what_else_is_on() -> None:
    flipped, both = _apply(Augment(flip=True), _batch()), _apply(Augment(flip=True, invert=1.0), _batch())
    assert torch.allclose(both, 255 - flipped, atol=1e-3)


def test_batch_in_parts_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _apply(ALL, _batch())
    monkeypatch.setattr("vlm.data.image._PART", 1000)
    assert torch.allclose(_apply(ALL, _batch()), whole, atol=1e-4)


def test_flip_mirrors_about_half() -> None:
    pixels = _batch(200)
    out = _apply(Augment(flip=True), pixels)
    kept = torch.isclose(out, pixels.float(), atol=1e-2).flatten(1).all(1)
    mirrored = torch.isclose(out, pixels.float().flip(3), atol=1e-2).flatten(1).all(1)
    assert bool((kept ^ mirrored).all()) and 60 < int(kept.sum()) < 140


def test_shrinking_shows_white_and_cutting_does_not() -> None:
    black = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
    cut = _apply(Augment(scale=(0.2, 1.0), ratio=0.5), black)
    assert cut[..., 1:-1, 1:-1].max() < 1e-3 and cut.max() < 128  # the very edge is anti-aliased
    shrunk = _apply(Augment(scale=(4.0, 4.0)), black)
    assert torch.allclose((shrunk < 128).float().mean((1, 2, 3)), torch.tensor(0.25), atol=0.07)
    assert bool((shrunk.amax((1, 2, 3)) == 255).all())


def test_affine_quarter_turn_of_an_oblong() -> None:
    images = torch.zeros(1, 3, 4, 8)
    images[0, :, 1, 5] = 1  # from the centre: 1.5 right, 0.5 up
    one, zero = torch.ones(1), torch.zeros(1)
    out = resample(images, affine(torch.full((1,), math.pi / 2), one, one, zero, zero, 2.0))
    # The output at (right, down) looks at the input at (-down, right): so 1.5 up, 0.5 left of the centre is lit.
    assert out[0, 0].round(decimals=4).nonzero().tolist() == [[0, 3]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9), st.integers(2, 9))
def test_resample_equals_affine_grid(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, height, width, generator=generator)
    theta = torch.randn(3, 2, 3, generator=generator)
    grid = functional.affine_grid(theta, [3, 3, height, width], align_corners=False)
    expected = functional.grid_sample(images, grid, align_corners=False)
    assert torch.allclose(resample(images, theta), expected, atol=1e-4)


def test_grey_and_white_survive_hue_saturation_and_mixing() -> None:
    grey = torch.arange(0, 256, dtype=torch.uint8).view(16, 1, 4, 4).expand(-1, 3, -1, -1).contiguous()
    out = _apply(Augment(hue=0.5, saturation=1.0, mix=0.5, grey=0.5), grey)
    assert torch.allclose(out, grey.float(), atol=0.5)


def test_hue_by_hand() -> None:
    turned = turn_hue(torch.tensor([0.0, 1 / 3, 1.0]))
    assert torch.allclose(turned[[0, 2]], torch.eye(3).expand(2, 3, 3), atol=1e-5)
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(luma @ turned[1], luma, atol=1e-5)
    assert int((turned[1] @ torch.tensor([1.0, 0, 0])).argmax()) != 0  # red is red no more


def test_probabilities_of_one() -> None:
    pixels = _batch()
    grey = _apply(Augment(grey=1.0), pixels)
    luma = (pixels.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert torch.allclose(grey, luma[:, None].expand(-1, 3, -1, -1), atol=1e-2)
    assert torch.allclose(_apply(Augment(invert=1.0), pixels), 255 - pixels.float(), atol=1e-3)


def test_brightness_scales_and_contrast_keeps_the_mean() -> None:
    dark = torch.full((50, 3, 4, 4), 100, dtype=torch.uint8)
    factor = _apply(Augment(brightness=0.5), dark)[:, 0, 0, 0] / 100
    assert 0.5 <= factor.min() < 0.65 and 1.35 < factor.max() <= 1.5
    pixels = torch.randint(100, 150, (50, 3, 8, 8), dtype=torch.uint8)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    out = _apply(Augment(contrast=0.5), pixels)
    assert torch.allclose((out * luma).sum(1).mean((1, 2)), (pixels * luma).sum(1).mean((1, 2)), atol=0.1)
    assert (out.std((2, 3)) / pixels.float().std((2, 3))).aminmax().max > 1.3


def test_erase_fills_one_rectangle() -> None:
    pixels = torch.full((100, 3, 32, 32), 77, dtype=torch.uint8)
    changed = (_apply(Augment(erase=1.0, erase_area=(0.1, 0.1)), pixels) != 77).any(1)
    share = changed.float().mean((1, 2))
    assert bool(((share > 0.05) & (share < 0.16)).all())
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(rows * columns, changed.sum((1, 2)))  # a full rectangle
    assert 30 < int((_apply(Augment(erase=0.5), pixels) != 77).flatten(1).any(1).sum()) < 70


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotate": -1.0}, "augment.rotate=-1.0: must be 0 or more"),
        ({"grey": 1.5}, "augment.grey=1.5: is a probability"),
        ({"scale": (1.0, 0.5)}, "augment.scale"),
        ({"erase_area": (0.0, 0.5)}, "augment.erase_area"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**fields)
