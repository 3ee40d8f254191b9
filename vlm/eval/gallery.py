"""Pictures small enough for a page that many of them stand on."""

import io

from vlm.data.image import decode

SIDE = 320  # pixels of the longer side


def small(picture: bytes) -> bytes:
    """An encoded picture as a small JPEG. BadSample: it cannot be read."""
    image = decode(picture)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
