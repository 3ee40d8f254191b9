"""Random changes of a training batch: off means off, seeds repeat, geometry and colours by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from vlm.data.augment import Augment, affine, resample, turn_hue

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
    monkeypatch.setattr("vlm.data.augment._PART", 1000)
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
