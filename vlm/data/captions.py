"""Captions and fields out of what is stored beside a picture: where they stand, and what is made of them."""

import json
import re
from typing import Any

from vlm.data.image import BadSample

MAX_CHARACTERS = 10_000  # of one caption; the rest could never be used

Captions = list[tuple[str, str | None]]  # suffix of a member, and the field of its json


def parse_caption(spec: str) -> Captions:
    """ "txt;json:caption" -> [("txt", None), ("json", "caption")]."""
    found = []
    for part in spec.split(";"):
        suffix, colon, name = part.strip().partition(":")
        if not suffix or (colon and not name) or (suffix == "json" and not name):
            raise ValueError(f"caption={spec!r}: write txt, json:FIELD, or several separated by ';'")
        found.append((suffix.lower(), name or None))
    return found


def find_captions(wanted: Captions, data: dict[str, bytes], fields: dict[str, Any]) -> list[str]:
    """The cleaned captions of the first of the `wanted` that is there; `fields` are those of the member json."""
    for suffix, name in wanted:
        if suffix not in data:
            continue
        if name is None:
            found: Any = _utf8(data[suffix]).split("\n")
        else:
            found = (fields if suffix == "json" else json_fields(data[suffix])).get(name)
        if found is not None:
            return clean_captions([found] if isinstance(found, str) else found)
    raise BadSample("no caption", f"looked for {caption_spec(wanted)}")


def caption_spec(wanted: Captions) -> str:
    """The opposite of `parse_caption`."""
    return ";".join(suffix if name is None else f"{suffix}:{name}" for suffix, name in wanted)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", str(error)) from None


def json_fields(data: bytes) -> dict[str, Any]:
    """The object in a piece of JSON. BadSample when it is none."""
    try:
        fields = json.loads(_utf8(data))
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable json", str(error)) from None
    if not isinstance(fields, dict):
        raise BadSample("unreadable json", "no object with fields")
    return fields


def clean_captions(captions: Any) -> list[str]:
    """Captions with white space and control characters folded to single spaces, half surrogate pairs replaced."""
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise BadSample("caption is not text", repr(captions)[:80])
    whole = (text[:MAX_CHARACTERS].encode("utf-8", "replace").decode() for text in captions)
    folded = (" ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split()) for text in whole)
    if kept := [text for text in folded if text]:
        return kept
    raise BadSample("empty caption")
