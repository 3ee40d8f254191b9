"""JSON of known layouts: COCO captions, Karpathy's splits, LLaVA's conversations, plain lists.

A `.json` file has to be parsed whole, which takes several times its size in memory for a moment; `.jsonl` does not.
"""

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.captions import Captions
from vlm.data.image import BadSample
from vlm.data.loader import MAX_WARNINGS
from vlm.data.pictures import Record, Records, picture_id, picture_key
from vlm.data.source_rows import Row, Rows, Whole
from vlm.data.source_tables import Table
from vlm.data.talk import COLUMNS, MAX_PICTURES, read_talk, shown

log = logging.getLogger(__name__)


def json_records(
    file: Path, image: list[str], caption: Captions, id_field: str | None, split: str, images: Path, whole: bool = False
) -> Records:
    """The records of a JSON file; `split`: Karpathy's, several separated by commas; `whole`: as of `Conversations`.

    Errors: no JSON, a layout that is none of the known ones (with what was found), a split that is not there.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "; one object a line is read from a name that ends in .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{file}: not JSON: {error}{hint}") from None
    pictures, annotations = _objects(found, "images"), _objects(found, "annotations")
    if pictures and "sentences" in pictures[0]:
        return _karpathy(file, pictures, id_field, split, images)
    if split:
        raise ValueError(f"{file}#{split}: has no splits; only Karpathy's JSON (images with sentences) has")
    if pictures and annotations:
        return _coco(file, pictures, annotations, id_field)
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        rows = Whole(file, "JSON list", found)
        return Conversations(rows, whole) if talks(rows.columns) else Table(rows, image, caption, id_field)
    raise ValueError(
        f"{file}: an unknown layout: {_shape(found)}. Known: COCO captions (images and annotations with caption), "
        "Karpathy's (images with sentences), LLaVA's (a list with conversations or messages), a list of objects"
    )


def _objects(found: Any, name: str) -> list[Row]:
    """The list of objects of this name, or none."""
    listed = found.get(name) if isinstance(found, dict) else None
    return listed if isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed) else []


def _shape(found: Any) -> str:
    if isinstance(found, dict):
        parts = (f"{name} ({_shape(value)})" for name, value in list(found.items())[:12])
        return f"an object with {', '.join(parts)}"
    if isinstance(found, list):
        inner = ", ".join(list(found[0])[:12]) if found and isinstance(found[0], dict) else ""
        return f"a list of {len(found)}" + (f", the first with {inner}" if inner else "")
    return type(found).__name__


def _coco(file: Path, pictures: list[Row], annotations: list[Row], id_field: str | None) -> Table:
    if "caption" not in annotations[0]:
        raise ValueError(
            f"{file}: its annotations have no caption, only {', '.join(annotations[0])}; "
            "COCO's captions are in captions_train2017.json and the like"
        )
    texts: dict[Any, list[str]] = {}
    for entry in annotations:
        texts.setdefault(entry.get("image_id"), []).append(entry.get("caption", ""))
    known = {entry.get("id") for entry in pictures}
    orphans = sum(len(found) for number, found in texts.items() if number not in known)
    rows = ({**entry, "captions": texts.get(entry.get("id"), [])} for entry in pictures)
    table = _table(file, "COCO captions (parsed whole)", rows, "file_name", id_field)
    if orphans:
        table.bad["caption of an unknown picture"] += orphans
        table.seen += orphans
    return table


def _karpathy(file: Path, pictures: list[Row], id_field: str | None, split: str, images: Path) -> Records:
    counts = Counter(str(entry.get("split")) for entry in pictures)
    wanted = {name.strip() for name in split.split(",") if name.strip()}
    if not wanted or wanted - set(counts):
        there = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
        raise ValueError(
            f"{file}: Karpathy's splits are {there}; name those to read: {file}#{next(iter(counts))} (--split)"
            + (f"; there is no {', '.join(sorted(wanted - set(counts)))}" if wanted else "")
        )

    def rows() -> Iterator[Row]:
        inside: dict[str, bool] = {}
        for entry in pictures:
            if str(entry.get("split")) not in wanted:
                continue
            folder, name = str(entry.get("filepath") or ""), str(entry.get("filename") or "")
            if folder and inside.setdefault(folder, (images / folder).is_dir()):
                name = f"{folder}/{name}"
            captions = [sentence.get("raw", "") for sentence in _objects(entry, "sentences")]
            extra = {key: value for key, value in entry.items() if key != "sentences"}
            yield {**extra, "image": name, "captions": captions}

    kind = f"Karpathy's JSON (parsed whole), split {', '.join(sorted(wanted))}"
    return _table(file, kind, rows(), "image", id_field)


def _table(file: Path, kind: str, rows: Iterator[Row], image: str, id_field: str | None) -> Table:
    return Table(Whole(file, kind, rows), [image], [("json", "captions")], id_field)


def talks(columns: list[str]) -> bool:
    """Whether rows with these columns are conversations."""
    return any(name in columns for name in COLUMNS)


class Conversations:
    """LLaVA's records, old (`conversations` of from and value) or chat form (`messages` of role and content).

    `whole`: with all their turns and pictures; else a record has one picture, and its caption is the assistant's first
    answer. The conversation stays among the fields as it was found. One picture may have several records: each keeps
    its own key, and their id is the picture's path.
    """

    def __init__(self, rows: Rows, whole: bool = False) -> None:
        """Read all rows once."""
        self.files, self._rows, self._whole = rows.files, rows, whole
        read = "all turns" if whole else "caption: the first answer"
        self.about = f"LLaVA conversations ({rows.kind}); picture: 'image', {read}"
        self.bad: Counter[str] = Counter()
        self._numbers, self.seen = array("q"), 0
        wanted = [name for name in rows.columns if name in (*COLUMNS, "id", "image", "images")]
        for number, found in enumerate(rows.scan(wanted)):
            self.seen += 1
            try:
                self._record(number, found, scanned=True)
                self._numbers.append(number)
            except BadSample as bad:
                if self.bad.total() < MAX_WARNINGS:
                    log.warning("unusable %s: %s", rows.where(number), bad)
                self.bad[bad.reason] += 1

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        number = self._numbers[index]
        return self._record(number, self._rows.row(number))

    def where(self, index: int) -> str:
        """File and row."""
        return self._rows.where(self._numbers[index])

    def _record(self, number: int, row: Row | BadSample, scanned: bool = False) -> Record:
        """`scanned`: of a Parquet file, without the bytes of its pictures, maybe without telling how many there are."""
        if isinstance(row, BadSample):
            raise row
        unknown = scanned and any(row.get(name) == b"" for name in ("image", "images"))
        pictures = [] if unknown else [_reference(found) for found in shown(row)]
        talk = read_talk(row, len(pictures) if self._whole and not unknown else None)
        if len(pictures) > MAX_PICTURES:
            raise BadSample("too many pictures", f"{len(pictures)}, at most {MAX_PICTURES}")
        if not self._whole and not unknown:
            pictures = list(dict.fromkeys(pictures))
            if len(pictures) != 1:
                reason = "several pictures" if pictures else "no image"
                raise BadSample(reason, f"{len(pictures)} in one record; data.kind=chats takes any number")
        first, *more = pictures or [""]
        own, path = row.get("id"), first if isinstance(first, str) else ""
        key = str(own) if own is not None else picture_key(path) if path else f"{number:08d}"
        return Record(
            key=key,
            id=picture_id(path) if path else key,
            image=first,
            captions=[talk.answers[0]],
            fields=_without_bytes(row),
            more=tuple(more),
            talk=talk if self._whole else None,
        )


def _reference(found: Any) -> str | bytes:
    """A path, or the picture itself. BadSample for neither."""
    if isinstance(found, dict):
        found = found.get("bytes") or found.get("path")
    if not isinstance(found, str | bytes) or not found.strip():
        raise BadSample("no image", f"{found!r:.60}")
    return found


def _without_bytes(value: Any) -> Any:
    """The same without the pictures that a row itself holds."""
    if isinstance(value, dict):
        return {name: _without_bytes(held) for name, held in value.items() if not isinstance(held, bytes)}
    return [_without_bytes(held) for held in value] if isinstance(value, list) else value
