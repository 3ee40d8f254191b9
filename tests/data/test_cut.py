"""Parts of pictures cut before they are resized: torchvision's RandomResizedCrop, pixels and proportions alike."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from vlm.data.augment import TRIES, Augment, Cut
from vlm.data.image import ImageTransform, decode

HALF = (0.5, 0.5, 0.5)
SQUARE, OBLONG = ImageTransform((64, 64), HALF, HALF), ImageTransform((48, 96), HALF, HALF)


def _photograph(width: int, height: int) -> bytes:
    small = np.random.default_rng(width).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _numbers(seed: int) -> Any:
    return np.random.default_rng(seed).random(3 + 2 * TRIES)


@pytest.mark.parametrize("transform", [SQUARE, OBLONG, replace(SQUARE, resize="squash", interpolation="bilinear")])
@pytest.mark.parametrize("size", [(320, 240), (100, 260), (64, 64), (40, 30)])
def test_equals_torchvision_s_resized_crop(size: tuple[int, int], transform: ImageTransform) -> None:
    data = _photograph(*size)
    cut = Cut(transform, scale=(0.2, 0.9), ratio=0.4, flip=True)
    picture, whole = cut.read(data), decode(data)
    assert torch.equal(picture, pil_to_tensor(whole))
    flipped = 0
    for seed in range(8):
        numbers = _numbers(seed)
        box = cut.box(whole.height, whole.width, numbers[1:])
        expected = resized_crop(whole, *box, list(transform.size), InterpolationMode(transform.interpolation))
        if numbers[0] < 0.5:
            expected, flipped = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped + 1
        found = cut(picture, np.random.default_rng(seed))
        difference = (found.int() - pil_to_tensor(expected).int()).abs()
        assert found.shape == (3, *transform.size) and found.is_contiguous()
        assert difference.max() <= 2 and difference.float().mean() <= 0.2  # rounding
    assert 0 < flipped < 8


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.sampled_from([SQUARE, OBLONG, replace(SQUARE, resize="squash")]),
    st.integers(0, 1000),
)
def test_boxes_lie_inside_and_are_as_asked_for(
    height: int, width: int, least: float, ratio: float, transform: ImageTransform, seed: int
) -> None:
    cut = Cut(transform, scale=(least, 1.0), ratio=ratio)
    top, left, cut_h, cut_w = cut.box(height, width, _numbers(seed)[1:])
    assert 0 <= top <= top + cut_h <= height and 0 <= left <= left + cut_w <= width and cut_h and cut_w
    target_h, target_w = transform.size
    natural = width / height if transform.resize == "squash" else target_w / target_h
    # Rounding moves each side by half a pixel.
    assert (cut_w - 0.5) / (cut_h + 0.5) <= natural * (1 + ratio) and (cut_w + 0.5) / (cut_h - 0.5) >= natural / (
        1 + ratio
    )


def _fallback(height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's, where no cut fits."""
    found: tuple[int, int, int, int] = RandomResizedCrop.get_params(torch.empty(3, height, width), [1, 1], [1, 1])
    return found


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (64, 65), (50, 50)])
def test_largest_in_the_middle_where_nothing_fits(height: int, width: int) -> None:
    cut = Cut(SQUARE, scale=(1.0, 1.0), ratio=0.0)
    assert cut.box(height, width, _numbers(0)[1:]) == _fallback(height, width)


def test_areas_places_and_proportions_spread_as_torchvision_s() -> None:
    cut = Cut(SQUARE, scale=(0.1, 0.6), ratio=0.5)
    ours = torch.tensor([cut.box(300, 400, _numbers(seed)[1:]) for seed in range(2000)]).double()
    torch.manual_seed(0)
    canvas = torch.empty(3, 300, 400)
    drawn = [RandomResizedCrop.get_params(canvas, [0.1, 0.6], [1 / 1.5, 1.5]) for _ in range(2000)]
    theirs = torch.tensor(drawn).double()
    for share in (0.1, 0.5, 0.9):
        assert torch.allclose(ours.quantile(share, 0), theirs.quantile(share, 0), atol=9)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(30, 700),
    st.integers(30, 700),
    st.floats(0.1, 1),
    st.floats(0, 1),
    st.sampled_from([SQUARE, OBLONG, replace(SQUARE, resize="squash")]),
    st.integers(0, 1000),
)
def test_scaled_decoding_leaves_the_part_enough_pixels(
    height: int, width: int, least: float, ratio: float, transform: ImageTransform, seed: int
) -> None:
    cut = Cut(transform, scale=(least, 1.0), ratio=ratio)
    for across, down in ((width, height), (height, width)):  # EXIF may turn it
        keep = cut.least(across, down)
        divisor = next((d for d in (8, 4, 2) if min(across, down) // keep >= d), 1)
        _, _, cut_h, cut_w = cut.box(-(-height // divisor), -(-width // divisor), _numbers(seed)[1:])
        assert divisor == 1 or (cut_h >= transform.size[0] - 1 and cut_w >= transform.size[1] - 1)


def test_scaled_decoding_by_hand() -> None:
    scaled = replace(SQUARE, scaled=True)
    data = _photograph(320, 240)
    for scale, size in (((1.0, 1.0), None), ((0.9, 1.0), (3, 120, 160)), ((0.1, 1.0), (3, 240, 320))):
        picture = Cut(scaled, scale=scale, flip=True).read(data)
        assert picture.shape == (size or (3, 64, 64))


def test_only_mirrored_pictures_keep_the_encoder_s_view() -> None:
    data = _photograph(100, 60)
    cut, rest = Augment(flip=True).split(SQUARE)
    assert cut is not None and rest is None
    plain = SQUARE.read(data)
    found = [cut(cut.read(data), np.random.default_rng(seed)) for seed in range(40)]
    mirrored = sum(torch.equal(picture, plain.flip(2)) for picture in found)
    assert mirrored + sum(torch.equal(picture, plain) for picture in found) == 40 and 8 < mirrored < 32


@pytest.mark.parametrize(
    ("augment", "cuts", "rest"),
    [
        (Augment(), False, None),
        (Augment(erase_area=(0.1, 0.1)), False, None),
        (Augment(scale=(0.5, 1.0), ratio=0.3), True, None),
        (Augment(scale=(0.5, 1.0), flip=True, hue=0.1), True, Augment(hue=0.1)),
        (Augment(flip=True, erase=0.5, erase_area=(0.1, 0.1)), True, Augment(erase=0.5, erase_area=(0.1, 0.1))),
        (Augment(scale=(0.5, 1.1)), False, Augment(scale=(0.5, 1.1))),
        (Augment(scale=(0.5, 1.0), rotate=5.0), False, Augment(scale=(0.5, 1.0), rotate=5.0)),
        (Augment(shift=0.1, flip=True), False, Augment(shift=0.1, flip=True)),
        (Augment(grey=0.1), False, Augment(grey=0.1)),
    ],
)
def test_what_is_done_before_and_what_after(augment: Augment, cuts: bool, rest: Augment | None) -> None:
    cut, left = augment.split(SQUARE)
    assert (cut is not None) == cuts and left == rest


def test_padded_pictures_are_cut_afterwards() -> None:
    longest = replace(SQUARE, resize="longest")
    assert Augment(scale=(0.5, 1.0)).split(longest) == (None, Augment(scale=(0.5, 1.0)))
    cut, rest = Augment(flip=True).split(longest)
    assert cut is not None and rest is None
