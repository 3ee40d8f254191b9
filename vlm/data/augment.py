"""Random changes of training pictures: a cut taken before they are resized, and changes of the finished batch.

Letters: B batch, H height, W width; h, w: of a picture as decoded.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from vlm.data.image import ImageTransform, as_pixels, decode

# Rows: luma and the two colour axes of YIQ (FCC NTSC 1953). A turn in the I-Q plane shifts hue and keeps luma.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_PART = 2**19  # values that are changed at a time
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augment:
    """Random changes of training pictures; every field is a strength and off unless set.

    Of a batch: geometry is one affine resampling (white outside the picture), colour one matrix per picture, clipped at
    the end. `split` says what is better done before.
    """

    scale: tuple[float, float] = (1.0, 1.0)  # area of the part that is cut out; above 1 the picture shrinks onto white
    ratio: float = 0.0  # the cut's width : height is up to 1 + ratio, or one over that
    flip: bool = False  # mirror every other picture
    rotate: float = 0.0  # degrees, either way
    shift: float = 0.0  # share of the side, either way
    brightness: float = 0.0  # factor 1 ± this; so are contrast and saturation
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # turns, either way; 0.5 reaches every hue
    mix: float = 0.0  # how much channels leak into each other; grey stays grey
    grey: float = 0.0  # probability; so are invert and erase
    invert: float = 0.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.2)  # of the picture, filled with one random colour

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = value if isinstance(value, tuple) else (value, value)
            if not 0 <= low <= high or (isinstance(value, tuple) and low == 0):
                raise ValueError(f"augment.{field.name}={value}: must be 0 or more, a range must rise from above 0")
            if field.name in ("grey", "invert", "erase") and high > 1:
                raise ValueError(f"augment.{field.name}={value}: is a probability, at most 1")

    def split(self, transform: ImageTransform) -> "tuple[Cut | None, Augment | None]":
        """What is done to each picture before it is resized, and what is left for the batch.

        Cuts that are turned or shifted as well, and those of padded pictures, show what lies around them:
        they are left for the batch.
        """
        cut = Cut(transform, self.scale, self.ratio, self.flip)
        if (
            self.rotate
            or self.shift
            or self.scale[1] > 1
            or (transform.resize in ("longest", "padded") and not cut.whole)
        ):
            return None, self
        rest = replace(self, scale=(1.0, 1.0), ratio=0.0, flip=False)
        nothing = replace(Augment(), erase_area=self.erase_area)
        return None if cut.whole and not self.flip else cut, None if rest == nothing else rest

    def __call__(self, pixels: UInt8[Tensor, "B 3 H W"], generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
        """Changed pixels, 0..255; the draws come from `generator` alone and do not depend on which changes are on."""
        rows = torch.rand(32, len(pixels), generator=generator, device=generator.device).to(pixels.device)
        out = torch.empty(pixels.shape, device=pixels.device)
        # In parts whose scratch memory the allocator keeps: for a whole batch it asks for fresh pages at every step,
        # which takes longer than the arithmetic.
        part = max(1, _PART // max(1, pixels[:1].numel()))
        for i in range(0, len(pixels), part):
            out[i : i + part] = self._change(pixels[i : i + part].float(), _Draws(rows[:, i : i + part]))
        return out

    def _change(self, images: Float[Tensor, "B 3 H W"], draws: "_Draws") -> Float[Tensor, "B 3 H W"]:
        if self.scale != (1.0, 1.0) or self.ratio or self.flip or self.rotate or self.shift:
            theta = self._theta(draws, *images.shape[-2:])
            images = resample(images.sub_(255), theta).add_(255)  # zero outside becomes white
        if self.brightness or self.contrast or self.saturation or self.hue or self.mix or self.grey or self.invert:
            colour, offset = self._colour(draws, images)
            images = torch.bmm(colour, images.flatten(2)).add_(offset).clamp_(0, 255).view_as(images)
        return self._erase(draws, images) if self.erase else images

    def _theta(self, draws: "_Draws", height: int, width: int) -> Float[Tensor, "B 2 3"]:
        area = draws.uniform(0, *self.scale)
        stretch = draws.around(1, math.log1p(self.ratio)).exp()
        largest = max(1.0, math.sqrt(self.scale[1]))  # the ratio alone must not push the cut over the edge
        cut_w, cut_h = (area * stretch).sqrt().clamp(max=largest), (area / stretch).sqrt().clamp(max=largest)
        angle = draws.around(2, self.rotate) * (math.pi / 180)
        mirror = torch.where(draws.chance(3, 0.5 if self.flip else 0.0), -1.0, 1.0)
        left = draws.around(4, 1.0) * (1 - cut_w).abs() + draws.around(5, 2 * self.shift)
        top = draws.around(6, 1.0) * (1 - cut_h).abs() + draws.around(7, 2 * self.shift)
        return affine(angle, cut_w * mirror, cut_h, left, top, width / height)

    def _colour(self, draws: "_Draws", images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, Tensor]:
        """All colour changes as one map x -> matrix x + offset: B 3 3 and B 3 1."""
        noise = draws.rows(8, 9).reshape(-1, 3, 3) * 2 - 1
        luma, eye = _LUMA.to(images.device), torch.eye(3, device=images.device)
        matrix = eye + self.mix * (noise - noise.mean(2, keepdim=True))
        matrix = turn_hue(draws.around(17, self.hue)) @ matrix
        saturation = draws.factor(18, self.saturation) * ~draws.chance(19, self.grey)
        matrix = (saturation[:, None, None] * eye + (1 - saturation)[:, None, None] * luma) @ matrix
        matrix = matrix * draws.factor(20, self.brightness)[:, None, None]
        contrast = draws.factor(21, self.contrast)[:, None, None]
        middle = luma @ (matrix @ images.mean((2, 3))[..., None]) if self.contrast else images.new_zeros(1)
        matrix, offset = contrast * matrix, ((1 - contrast[..., 0]) * middle)[..., None]
        sign = torch.where(draws.chance(22, self.invert), -1.0, 1.0)[:, None, None]
        return sign * matrix, sign * offset + 127.5 * (1 - sign)

    def _erase(self, draws: "_Draws", images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        area = draws.uniform(23, *self.erase_area)
        stretch = draws.around(24, math.log(3)).exp()
        inside = draws.chance(25, self.erase)[:, None, None]
        for axis, side, row in (
            (1, (area * stretch).sqrt().clamp(max=1), 26),
            (2, (area / stretch).sqrt().clamp(max=1), 27),
        ):
            start = draws.uniform(row, 0.0, 1.0) * (1 - side)
            count = images.shape[axis + 1]
            place = (torch.arange(count, device=images.device) + 0.5) / count
            along = (place >= start[:, None]) & (place < (start + side)[:, None])
            inside = inside & along.unsqueeze(3 - axis)
        colour = draws.rows(28, 3)[..., None, None] * 255
        return images.lerp(colour, inside[:, None].float())  # weights 0 and 1 are exact; faster than `where`


TRIES = 10  # cuts drawn before the largest one in the middle is taken, as torchvision does


@dataclass(frozen=True)
class Cut:
    """A random part of a picture at the encoder's size, mirrored or not: what torchvision's RandomResizedCrop gives.

    It is taken before the picture is resized, so no pixel is resampled twice and none beside the part at all. Its
    proportions are the encoder's (of "squash": the picture's), changed by up to 1 + `ratio`.
    """

    transform: ImageTransform
    scale: tuple[float, float] = (1.0, 1.0)  # area of the part; with a `ratio` of 0 too the encoder's own view is kept
    ratio: float = 0.0
    flip: bool = False

    @property
    def whole(self) -> bool:
        """Is there nothing to cut?"""
        return self.scale == (1.0, 1.0) and not self.ratio

    def read(self, data: bytes) -> UInt8[Tensor, "3 h w"]:
        """From the bytes of a file to what is the same at every draw. BadSample."""
        if self.whole:
            return self.transform.read(data)
        return as_pixels(decode(data, least=self.least if self.transform.scaled else None))

    def __call__(self, picture: UInt8[Tensor, "3 h w"], random: np.random.Generator) -> UInt8[Tensor, "3 H W"]:
        """The part of a picture from `read`; the draws do not depend on what is on."""
        numbers = random.random(3 + 2 * TRIES)
        if not self.whole:
            top, left, height, width = self.box(picture.shape[1], picture.shape[2], numbers[1:])
            part = picture[:, top : top + height, left : left + width]
            picture = self.transform.resized(part, self.transform.size).contiguous()
        return picture.flip(2) if self.flip and numbers[0] < 0.5 else picture

    def box(self, height: int, width: int, numbers: npt.NDArray[np.float64]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part for 2 + 2 TRIES numbers of 0..1."""
        proportion = self._proportion(width, height)
        low, high = proportion / (1 + self.ratio), proportion * (1 + self.ratio)
        for area, stretch in numbers[2:].reshape(-1, 2).tolist():
            pixels = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
            drawn = low * (high / low) ** stretch
            cut_h, cut_w = round(math.sqrt(pixels / drawn)), round(math.sqrt(pixels * drawn))
            if 0 < cut_h <= height and 0 < cut_w <= width:
                return int(numbers[0] * (height - cut_h + 1)), int(numbers[1] * (width - cut_w + 1)), cut_h, cut_w
        cut_h, cut_w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
        return (height - cut_h) // 2, (width - cut_w) // 2, cut_h, cut_w

    def least(self, width: int, height: int) -> int:
        """Pixels that the shorter side must keep for the smallest part to have those the encoder takes."""
        share = math.sqrt(self.scale[0] / (1 + self.ratio))
        if self.transform.resize != "squash":
            proportion = self._proportion(width, height)
            skew, long = max(proportion, 1 / proportion), max(width, height) / min(width, height)
            share = min(1 / skew, share * math.sqrt(long / skew))
        return math.ceil(max(self.transform.size) / share)

    def _proportion(self, width: int, height: int) -> float:
        target_h, target_w = self.transform.size
        return width / height if self.transform.resize == "squash" else target_w / target_h


class _Draws:
    """Rows of uniform numbers, a column per picture; each change owns its rows: switching one leaves the others."""

    def __init__(self, rows: Float[Tensor, "R B"]) -> None:
        self._rows = rows

    def rows(self, first: int, count: int) -> Float[Tensor, "B count"]:
        return self._rows[first : first + count].T

    def uniform(self, row: int, low: float, high: float) -> Float[Tensor, "B"]:
        return low + (high - low) * self._rows[row]

    def around(self, row: int, strength: float) -> Float[Tensor, "B"]:
        return self.uniform(row, -strength, strength)

    def factor(self, row: int, strength: float) -> Float[Tensor, "B"]:
        return self.uniform(row, max(0.0, 1 - strength), 1 + strength)

    def chance(self, row: int, probability: float) -> Tensor:
        return self._rows[row] < probability


def affine(angle: Tensor, cut_w: Tensor, cut_h: Tensor, left: Tensor, top: Tensor, aspect: float) -> Tensor:
    """B 2 3 maps from output to input coordinates (-1..1): scale by the cut, turn by `angle` (radians), move."""
    cos, sin = angle.cos(), angle.sin()
    # Coordinates are relative to each side: a turn must not shear a picture that is not square.
    rows = (cos * cut_w, -sin / aspect * cut_h, left), (sin * aspect * cut_w, cos * cut_h, top)
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def resample(images: Float[Tensor, "B 3 H W"], theta: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B 3 H W"]:
    """Bilinear; zero outside."""
    (height, width), device = images.shape[-2:], images.device
    across = (torch.arange(width, device=device) * 2 + 1) / width - 1
    down = (torch.arange(height, device=device) * 2 + 1) / height - 1
    # The same as affine_grid, which multiplies a matrix per pixel and takes longer than the sampling itself.
    columns = (theta[:, None, None, :, 0] * across[:, None]).expand(-1, height, -1, -1)
    grid = columns + (theta[:, None, :, 1] * down[:, None] + theta[:, None, :, 2])[:, :, None]
    return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def turn_hue(turns: Float[Tensor, "B"]) -> Float[Tensor, "B 3 3"]:
    """RGB matrices that turn the hue and keep luma and grey."""
    angle = turns * (2 * math.pi)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    yiq = _YIQ.to(turns.device)
    turned: Tensor = torch.linalg.inv(yiq) @ rows @ yiq
    return turned
