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

log = logging.getLogger(__name__)


def json_records(
    file: Path, image: list[str], caption: Captions, id_field: str | None, split: str, images: Path
) -> Records:
    """The records of a JSON file; `split`: Karpathy's, several separated by commas.

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
        return Conversations(rows) if talks(rows.columns) else Table(rows, image, caption, id_field)
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
    return "conversations" in columns or "messages" in columns


class Conversations:
    """LLaVA's records, old (`conversations` of from and value) or chat form (`messages` of role and content).

    The caption is the assistant's first answer; the whole conversation stays among the fields, as it was found. One
    picture may have several records: each keeps its own key, and their id is the picture's path.
    """

    def __init__(self, rows: Rows) -> None:
        """Read all rows once."""
        self.files, self._rows = rows.files, rows
        self._column = "conversations" if "conversations" in rows.columns else "messages"
        self.about = f"LLaVA conversations ({rows.kind}); picture: 'image', caption: the first answer"
        self.bad: Counter[str] = Counter()
        self._numbers, self.seen = array("q"), 0
        for number, found in enumerate(rows.scan(rows.columns)):
            self.seen += 1
            try:
                self._record(found)
                self._numbers.append(number)
            except BadSample as bad:
                if self.bad.total() < MAX_WARNINGS:
                    log.warning("unusable %s: %s", rows.where(number), bad)
                self.bad[bad.reason] += 1

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._record(self._rows.row(self._numbers[index]))

    def where(self, index: int) -> str:
        """File and row."""
        return self._rows.where(self._numbers[index])

    def _record(self, row: Row | BadSample) -> Record:
        if isinstance(row, BadSample):
            raise row
        turns = row.get(self._column)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadSample("no conversation", f"{self._column} is {turns!r:.60}")
        picture, own = _picture(row, turns), row.get("id")
        return Record(
            key=str(own) if own is not None else picture_key(picture),
            id=picture_id(picture),
            image=picture,
            captions=[_answer(turns)],
            fields=row,
        )


def _picture(row: Row, turns: list[Row]) -> str:
    found = row.get("image") or row.get("images") or [name for turn in turns for name in _shown(turn)]
    shown = found if isinstance(found, list) else [found]
    paths = [path for place, path in enumerate(shown) if path not in shown[:place]]
    if len(paths) > 1:
        raise BadSample("several pictures", f"{len(paths)} in one record")
    if not paths or not isinstance(paths[0], str) or not paths[0].strip():
        raise BadSample("no image", "a conversation about no picture" if not paths else f"{paths[0]!r:.60}")
    return paths[0]


def _parts(turn: Row) -> list[Row]:
    content = turn.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _shown(turn: Row) -> Iterator[Any]:
    """Pictures among the parts of a message."""
    for part in _parts(turn):
        found = next((part[name] for name in ("image", "path", "image_url", "url") if part.get(name)), None)
        if found is not None and str(part.get("type", "image")).startswith("image"):
            yield found.get("url") if isinstance(found, dict) else found


def _answer(turns: list[Row]) -> str:
    for turn in turns:
        if str(turn.get("from", turn.get("role"))).lower() in ("gpt", "assistant", "model"):
            text = turn.get("value", turn.get("content"))
            if isinstance(text, list):
                text = " ".join(str(part.get("text", "")) for part in _parts(turn))
            if isinstance(text, str):
                return text
    raise BadSample("no answer", "the assistant says nothing")
