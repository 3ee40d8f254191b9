"""Small pictures for pages: those of samples, or what is drawn over them."""

import io

from PIL import Image

from vlm.data.image import BadSample, decode
from vlm.data.pictures import Pictures

SIDE = 160  # pixels of the longer side, so that a page of a hundred pictures stays below 1 MB


def encode(image: Image.Image) -> bytes:
    """As WebP, a few kilobytes."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=80, method=4)
    return stream.getvalue()


def thumbnail(data: bytes, side: int = SIDE) -> bytes:
    """A picture made small; a smaller one keeps its size. BadSample."""
    image = decode(data, least=lambda width, height: side * min(width, height) // max(width, height) or 1)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encode(image)


def of_sample(source: Pictures, index: int, side: int = SIDE) -> bytes | None:
    """Of the picture of a sample; None where it cannot be shown: features in its place, or a file gone meanwhile."""
    try:
        return thumbnail(source.raw(index).image, side)
    except BadSample:
        return None
