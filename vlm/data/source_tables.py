"""Tables of pictures and captions: which columns hold what, and rows of one picture made into one record."""

import hashlib
import logging
from array import array
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.data.captions import Captions
from vlm.data.image import BadSample
from vlm.data.loader import MAX_WARNINGS
from vlm.data.pictures import PICTURES, Record, picture_id, picture_key
from vlm.data.source_rows import Row, Rows

IMAGE = (
    "image", "image_path", "filepath", "file_path", "file_name", "filename", "image_file", "image_name", "img_path",
    "img", "path", "file", "jpg", "jpeg", "png", "webp",
)  # fmt: skip
CAPTION = (
    "caption", "captions", "text", "txt", "title", "comment", "sentence", "sentences", "description", "alt_text", "raw",
)  # fmt: skip
_DIGEST = 16  # bytes; two pictures of equal digest are as good as impossible

log = logging.getLogger(__name__)


class Table:
    """Rows with a picture (a path, or its bytes) and captions (a string or a list) in two of their columns.

    Rows of one picture are one record: their captions in order, the fields of the first. `image`: the columns that may
    hold the picture, `caption`: where captions stand (`json:FIELD` is the column FIELD), first found wins; then the
    usual names are tried, if there are suffixes of pictures in `image`, or `txt` in `caption`.
    """

    def __init__(self, rows: Rows, image: list[str], caption: Captions, id_field: str | None) -> None:
        """Read all rows once. ValueError: no such column."""
        self.files, self._rows, self._id_field = rows.files, rows, id_field
        self._image = _column(rows, "picture", "--image-key, data.image", *_wanted_images(image))
        self._caption = _column(rows, "captions", "--caption-key, data.caption", *_wanted_texts(caption))
        if id_field is not None and id_field not in rows.columns:
            raise ValueError(f"{_no_column(rows, 'id', [id_field])} (--id-key, data.id)")
        self.bad: Counter[str] = Counter()
        kept, digests = array("q"), bytearray()
        for number, found in enumerate(rows.scan([self._image])):
            try:
                digests += _digest(_picture(found, self._image), number)
                kept.append(number)
            except BadSample as bad:
                if self.bad.total() < MAX_WARNINGS:
                    log.warning("unusable %s: %s", rows.where(number), bad)
                self.bad[bad.reason] += 1
        self.seen = len(kept) + self.bad.total()
        # `_order[_starts[i] : _starts[i + 1]]` are the rows of record i.
        self._order, self._starts = _group(np.array(kept, dtype=np.int64), bytes(digests))
        self.about = f"{rows.kind}; picture: {self._image!r}, captions: {self._caption!r}" + (
            "" if id_field is None else f", id: {id_field!r}"
        )
        if len(kept) > len(self):
            self.about += f"; {len(kept)} rows"

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record:
        first, *others = map(self._rows.row, self._order[self._starts[index] : self._starts[index + 1]].tolist())
        image = _picture(first, self._image)
        texts: list[Any] = []
        for row in (first, *others):
            found = row.get(self._caption)
            texts += found if isinstance(found, list) else [] if found is None else [found]
        fields = {name: value for name, value in first.items() if name != self._caption and not _binary(value)}
        name = image if isinstance(image, str) else _own_path(first[self._image])
        own = first.get(self._id_field) if self._id_field is not None else None
        return Record(
            key=picture_key(name) if name else f"{int(self._order[self._starts[index]]):08d}",
            id=str(own) if own is not None else _id_of(image),
            image=image,
            captions=texts,
            fields=fields,
        )

    def where(self, index: int) -> str:
        """File and row."""
        return self._rows.where(int(self._order[self._starts[index]]))


def _wanted_images(image: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Columns asked for, and those to try after them."""
    columns = [name for name in image if name not in PICTURES.split(";")]
    return columns, () if columns == image else IMAGE


def _wanted_texts(caption: Captions) -> tuple[list[str], tuple[str, ...]]:
    columns = [name for _, name in caption if name is not None]
    return columns, CAPTION if len(columns) < len(caption) else ()


def _column(rows: Rows, what: str, setting: str, wanted: list[str], usual: tuple[str, ...]) -> str:
    if found := next((name for name in wanted if name in rows.columns), None):
        return found
    own = {name.lower(): name for name in reversed(rows.columns)}
    if found := next((own[name] for name in usual if name in own), None):
        return found
    named = [] if usual else wanted
    raise ValueError(f"{_no_column(rows, what, named)}; name the right one ({setting})")


def _no_column(rows: Rows, what: str, wanted: list[str]) -> str:
    named = f" {' or '.join(map(repr, wanted))}" if wanted else ""
    return f"{rows.files[0]}: no column{named} for the {what}; {rows.kind} with the columns {', '.join(rows.columns)}"


def _picture(row: Row | BadSample, column: str) -> str | bytes:
    """The path or the bytes; empty bytes for those that the scan of a Parquet file leaves out."""
    if isinstance(row, BadSample):
        raise row
    value = row.get(column)
    if isinstance(value, dict) and isinstance(value.get("bytes") or value.get("path"), str | bytes):
        value = value.get("bytes") or value["path"]
    if isinstance(value, bytes) or (isinstance(value, str) and value.strip()):
        return value.strip() if isinstance(value, str) else value
    raise BadSample("no image", f"{column} is {value!r:.60}")


def _digest(picture: str | bytes, number: int) -> bytes:
    own = picture_id(picture) if isinstance(picture, str) else f"\0{number}"
    return hashlib.blake2b(own.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


def _id_of(picture: str | bytes) -> str:
    """Equal for equal paths, and for equal bytes where the table holds those: their paths are often all one name."""
    return (
        picture_id(picture) if isinstance(picture, str) else hashlib.blake2b(picture, digest_size=_DIGEST).hexdigest()
    )


def _own_path(value: Any) -> str | None:
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) and path.strip() else None


def _binary(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and any(map(_binary, value.values())))


def _group(rows: npt.NDArray[np.int64], digests: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of equal digest side by side, in the order of their first ones; where each group starts, and the end."""
    own = np.frombuffer(digests, dtype=f"V{_DIGEST}")
    _, first, group = np.unique(own, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    place = rank[group]
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(first)))]).astype(np.int64)
    return rows[np.argsort(place, kind="stable")], starts
