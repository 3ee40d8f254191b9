"""What is said of a picture, as a line of each format and back: which picture a line is about."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vlm.captioning.wishes import Format
from vlm.data.image import BadSample
from vlm.model.describe import Caption
from vlm.model.transcribe import one_line

CSV_HEADER = "image,caption,finish_reason\n"
_BREAKS = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True)
class Result:
    """What became of a picture: captions, the best first, or the reason why there are none."""

    name: str
    captions: Sequence[Caption] = ()
    error: BadSample | OSError | None = None
    question: str | None = None


class NotOurs(ValueError):
    """A line that this format does not have."""


def plain(name: str) -> str:
    """A name on one line without tabs."""
    return re.sub("[\t\n\r]", lambda found: _BREAKS[found[0]], name)


def reason(error: BadSample | OSError) -> str:
    """What happened, in words."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def lines(result: Result, format: Format) -> str:
    """All lines about a picture; none where the format has no place for what went wrong."""
    match format:
        case "jsonl":
            return _dump(_record(result)) + "\n"
        case "coco":
            entries = ({"image_id": image_id(result.name), "caption": one_line(c.text)} for c in result.captions[:1])
            return "".join(_dump(entry) + "\n" for entry in entries)
        case "csv":
            out = io.StringIO()
            rows = ([plain(result.name), one_line(each.text), each.finish] for each in result.captions)
            csv.writer(out, lineterminator="\n").writerows(rows)
            return out.getvalue()
        case _:
            return "".join(f"{plain(result.name)}\t{one_line(each.text)}\n" for each in result.captions)


def key(line: str, format: Format) -> str | None:
    """The picture that a line gives a caption of, as `key_of` calls it; None: it tells of an error. NotOurs."""
    try:
        match format:
            case "jsonl":
                record = json.loads(line)
                name = str(record["image"])
                return None if "error" in record else name
            case "coco":
                return str(json.loads(line)["image_id"])
            case "csv":
                ((name, _, _),) = csv.reader([line])
                return name
            case _:
                name, _ = line.split("\t")
                return name
    except (ValueError, TypeError, LookupError, csv.Error, RecursionError):
        raise NotOurs(f"no line of --format {format}") from None


def key_of(name: str, format: Format) -> str:
    """What a picture is called in lines of a format."""
    match format:
        case "jsonl":
            return name
        case "coco":
            return str(image_id(name))
        case _:
            return plain(name)


def image_id(name: str) -> int | str:
    """COCO's number at the end of a file's name (COCO_val2014_000000391895.jpg), or the name without its suffix."""
    stem = PurePath(name).stem
    number = re.search(r"\d+$", stem)
    return int(number[0]) if number else stem


def _record(result: Result) -> dict[str, Any]:
    record: dict[str, Any] = {"image": result.name}
    if result.question is not None:
        record["question"] = result.question
    if isinstance(result.error, BadSample):
        return record | {"error": result.error.reason, "detail": result.error.detail}
    if result.error is not None:
        return record | {"error": "cannot be read", "detail": reason(result.error)}
    told = [_told(caption) for caption in result.captions]
    return record | told[0] | ({"captions": told} if len(told) > 1 else {})


def _told(caption: Caption) -> dict[str, Any]:
    said = {"caption": caption.text, "finish_reason": caption.finish, "tokens": caption.tokens}
    return said if caption.score is None else {**said, "score": round(caption.score, 4)}


def _dump(value: Any) -> str:
    """JSON that is UTF-8 too: bytes of a name that are not are spelt out."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
