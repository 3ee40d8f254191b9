"""Bytes to pixels: safe decoding, the transform an encoder asks for.

Letters: H height, W width; h, w: of a picture as decoded.
"""

import io
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no EPS or the like: some of them start programs
MAX_ASPECT = 200  # resized to a square's height, a longer sliver would need gigabytes
LARGEST = 8192  # side of a square that a picture is padded to; longer ones are made smaller first
HUGE = 2**24  # bytes, from which on huge pages are asked for
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


Resize = Literal["shortest", "squash", "longest", "padded"]
Least = Callable[[int, int], int]  # from width and height: the pixels that the shorter side of a picture must keep


def decode(data: bytes, max_pixels: int = 50_000_000, least: Least | None = None) -> Image.Image:
    """The first frame as RGB, upright (EXIF), transparent parts on white, 16-bit and CMYK right.

    `least`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while both sides keep that many pixels, for speed.

    Refused from the header, before any pixel is unpacked: other formats than FORMATS, more than `max_pixels`, slivers.
    Colour profiles are not applied. Raises BadSample, nothing else.
    """
    if not data:
        raise BadSample("empty image file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height, max_pixels)
        if least is not None:
            image.draft(None, (least(image.width, image.height),) * 2)
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


def as_pixels(rgb: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """The same as a tensor, the channels last in memory."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def fresh(like: Tensor) -> Float[Tensor, "..."]:
    """Memory for float32 of the shape of `like`, to be written.

    What is too large for the allocator to keep comes from the system page by page, which takes three times as long as
    the arithmetic of a batch: there are huge pages for that.
    """
    size = like.numel() * 4
    if like.device.type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(like.shape, device=like.device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # goes with the tensor
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(like.shape)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop and normalise as an encoder was trained: as the PIL pipelines of timm and open_clip.

    Values differ from PIL's by rounding alone: seldom by one of 255 levels, hardly ever by two.
    `size` is (height, width). "shortest" fits the shorter side and cuts the middle, "squash" ignores proportions,
    "longest" fits the longer side and pads with `fill`, "padded" pads to a square first (LLaVA). `crop_fraction`
    (timm's crop_pct): share of the sides kept. `scaled`: JPEGs are decoded at a fraction of their size first, as long
    as they keep so many times the pixels needed; 0: never. Faster, and a little different, less so for large numbers.
    `floored`: a middle between two pixels is at the first, not at the even one (transformers' processors).
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_fraction: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)
    scaled: int = 0
    floored: bool = False

    def read(self, data: bytes) -> UInt8[Tensor, "3 H W"]:
        """As `pixels`, from the bytes of a file. BadSample."""
        return self.pixels(decode(data, least=self._least if self.scaled else None))

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 H W"]:
        """The resized and cropped picture, 0..255."""
        pixels = as_pixels(image if image.mode == "RGB" else image.convert("RGB"))
        if self.resize == "padded":
            pixels = self._square(pixels)
        pixels = self.resized(pixels, self._resized(pixels.shape[1], pixels.shape[2]))
        return self._centred(pixels).contiguous()

    def resized(self, pixels: UInt8[Tensor, "3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "3 H W"]:
        """All of it at another size; PIL's filter in whole numbers, several times faster where channels lie last."""
        if size == tuple(pixels.shape[1:]):
            return pixels
        given = pixels[None].contiguous(memory_format=torch.channels_last)  # interpolate itself would be slower at it
        return functional.interpolate(given, size, mode=self.interpolation, antialias=True)[0]

    def normalize(self, pixels: Tensor) -> Float[Tensor, "*B 3 H W"]:
        """Any uint8 or float ... 3 H W of 0..255, to mean 0 and deviation 1 where the encoder was trained.

        One shift and one scale: the reference pipelines take three steps, and three times as long, to within 1e-6.
        """
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return fresh(pixels).copy_(pixels).sub_(mean * 255).mul_(1 / (std * 255))

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """Picture to normalised tensor."""
        return self.normalize(self.pixels(image))

    def _least(self, width: int, height: int) -> int:
        return math.ceil(max(self.size) * self.scaled / self.crop_fraction)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        target_h, target_w = (math.floor(side / self.crop_fraction) for side in self.size)
        if self.resize in ("squash", "padded"):
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
        pixels = self._on_canvas(pixels, max(height, pixels.shape[1]), max(width, pixels.shape[2]))
        top, left = self._middle(pixels.shape[1] - height), self._middle(pixels.shape[2] - width)
        return pixels[:, top : top + height, left : left + width]

    def _square(self, pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 H H"]:
        height, width = pixels.shape[1:]
        if (shrink := max(height, width) / LARGEST) > 1:  # a sliver's square would take gigabytes
            pixels = self.resized(pixels, (max(1, round(height / shrink)), max(1, round(width / shrink))))
        side = max(pixels.shape[1:])
        return self._on_canvas(pixels, side, side)

    def _middle(self, spare: int) -> int:
        return spare // 2 if self.floored else round(spare / 2)

    def _on_canvas(self, pixels: UInt8[Tensor, "3 h w"], height: int, width: int) -> UInt8[Tensor, "3 H W"]:
        """In the middle of at least its own size, filled around."""
        _, given_h, given_w = pixels.shape
        if (given_h, given_w) == (height, width):
            return pixels
        top, left = (height - given_h) // 2, (width - given_w) // 2
        canvas = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width).clone()
        canvas[:, top : top + given_h, left : left + given_w] = pixels
        return canvas
