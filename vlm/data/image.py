"""Bytes to pixels: safe decoding, the transform an encoder asks for, random changes of a training batch.

Letters: B batch, H height, W width.
"""

import io
import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no EPS or the like: some of them start programs
MAX_ASPECT = 200  # resized to a square's height, a longer sliver would need gigabytes
TRAITS = ("grey", "palette", "CMYK", "alpha", "16 bit", "float", "turned by EXIF", "animated")

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(Exception):
    """A sample that cannot be used: `reason` is a short name to count by, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def decode(data: bytes, max_pixels: int = 50_000_000, least: int | None = None) -> Image.Image:
    """The first frame as RGB, upright (EXIF), transparent parts on white, 16-bit and CMYK right.

    `least`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while both sides keep so many pixels, for speed.

    Refused from the header, before any pixel is unpacked: other formats than FORMATS, more than `max_pixels`, slivers.
    Colour profiles are not applied. Raises BadSample, nothing else.
    """
    if not data:
        raise BadSample("empty image file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height, max_pixels)
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        return _upright(_to_rgb(image), image)
    except BadSample:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("too many pixels", str(error)) from None
    except UnidentifiedImageError:
        raise BadSample("not an image", f"no {', '.join(FORMATS)}; starts with {data[:12]!r}") from None
    except Exception as error:  # damaged files raise whatever the decoder stumbles over
        raise BadSample("corrupt image", f"{type(error).__name__}: {error}") from None


def traits(data: bytes) -> list[str]:
    """What is unusual about a picture that `decode` takes, none of it a fault: TRAITS that hold, in that order."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    wide = image.mode.startswith("I") or (image.format == "PNG" and data[24] == 16)  # PIL hides 16 bits of colour
    try:
        turned = image.getexif().get(0x0112, 1) in _TURN
        moving = getattr(image, "n_frames", 1) > 1
    except Exception:  # damage behind the first frame, which is all that is used
        turned = moving = False
    holds = (
        image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"),
        image.mode in ("P", "PA"),
        image.mode == "CMYK",
        image.has_transparency_data,
        wide,
        image.mode == "F",
        turned,
        moving,
    )
    return [name for name, true in zip(TRAITS, holds, strict=True) if true]


def _check_size(width: int, height: int, max_pixels: int) -> None:
    size = f"{width} x {height}"
    if width * height > max_pixels:
        raise BadSample("too many pixels", f"{size}, at most {max_pixels}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("extreme aspect ratio", f"{size}, at most {MAX_ASPECT} : 1")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    try:
        turn = _TURN.get(
            source.getexif().get(0x0112, 1)
        )  # after load(): TIFF is turned by PIL itself, which drops the tag
    except Exception:  # damaged EXIF says nothing about the pixels, which are fine
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide_grey(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    front = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), front).convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or float, which PIL would clip to 255. The range is taken from the format or the values."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadSample("corrupt image", "pixels that are not finite")
    top = float(values.max())
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    grey = np.rint(values * (255 / next((full for full in usual if top <= full), top)))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, 255, grey)
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop and normalise as an encoder was trained: as the PIL pipelines of timm and open_clip.

    Values differ from PIL's by rounding alone: seldom by one of 255 levels, hardly ever by two.
    `size` is (height, width). "shortest" fits the shorter side and cuts the middle, "squash" ignores proportions,
    "longest" fits the longer side and pads with `fill`. `crop_fraction` (timm's crop_pct): share of the sides kept.
    `scaled`: large JPEGs are decoded at a fraction of their size first; faster, and a little different.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["shortest", "squash", "longest"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_fraction: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)
    scaled: bool = False

    def read(self, data: bytes) -> UInt8[Tensor, "3 H W"]:
        """As `pixels`, from the bytes of a file. BadSample."""
        least = math.ceil(max(self.size) / self.crop_fraction) if self.scaled else None
        return self.pixels(decode(data, least=least))

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 H W"]:
        """The resized and cropped picture, 0..255."""
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
        size = self._resized(rgb.height, rgb.width)
        if size != tuple(pixels.shape[1:]):
            # PIL's filter in whole numbers, several times faster than PIL's own where channels come last, as here.
            pixels = functional.interpolate(pixels[None], size, mode=self.interpolation, antialias=True)[0]
        return self._centred(pixels).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Any uint8 or float ... 3 H W of 0..255 to float, of mean 0 and deviation 1 where the encoder was trained."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        # This order of operations, not one fused scale and shift, gives the very bits of the reference pipelines.
        scaled = pixels / 255 if pixels.is_floating_point() else pixels.float().div_(255)
        return scaled.sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """Picture to normalised tensor."""
        return self.normalize(self.pixels(image))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        target_h, target_w = (math.floor(side / self.crop_fraction) for side in self.size)
        if self.resize == "squash":
            return target_h, target_w
        if self.resize == "shortest" and target_h == target_w:  # torchvision cuts off the fraction, the others round
            short = min(height, width)
            return (
                (target_h, int(target_h * width / short))
                if height <= width
                else (int(target_w * height / short), target_w)
            )
        ratios = height / target_h, width / target_w
        ratio = min(ratios) if self.resize == "shortest" else max(ratios)
        return round(height / ratio), round(width / ratio)

    def _centred(self, pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 H W"]:
        height, width = self.size
        _, given_h, given_w = pixels.shape
        if given_w < width or given_h < height:
            short_w, short_h = max(width - given_w, 0), max(height - given_h, 0)
            fill = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1)
            canvas = fill.expand(3, given_h + short_h, given_w + short_w).clone()
            canvas[:, short_h // 2 : short_h // 2 + given_h, short_w // 2 : short_w // 2 + given_w] = pixels
            pixels = canvas
        top, left = round((pixels.shape[1] - height) / 2), round((pixels.shape[2] - width) / 2)
        return pixels[:, top : top + height, left : left + width]


# Rows: luma and the two colour axes of YIQ (FCC NTSC 1953). A turn in the I-Q plane shifts hue and keeps luma.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_PART = 2**19  # values that are changed at a time
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augment:
    """Random changes of a batch; every field is a strength and off unless set.

    Geometry is one affine resampling (white outside the picture), colour one matrix per picture, clipped at the end.
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
