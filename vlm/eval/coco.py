"""COCO's JSON of captions: results ([{"image_id", "caption"}]) and references ({"images", "annotations"}).

Results may also be JSON lines, and name the picture instead of its id ({"image", "caption"}, as `vlm caption --json`
prints). Where ids are numbers in one file and texts in the other, "12" means 12.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

Id = int | str
Entry = dict[str, Any]
MAX_CHARACTERS = 10_000  # of one caption
SHOWN = 3  # ids named in a message


@dataclass(frozen=True)
class References:
    """What people wrote about each image, in the order of the file, and the images' files where it names them."""

    name: str
    captions: Mapping[Id, list[str]]
    files: Mapping[Id, str]

    def find(self, entry: Entry) -> Id | None:
        """The image that an entry of results is about; None: there is no such image, or several of that name."""
        if "image_id" not in entry:
            return self._named.get(PurePath(str(entry.get("image"))).name)
        found = entry["image_id"]
        return found if isinstance(found, Id) and found in self.captions else self._spelled.get(str(found))

    @cached_property
    def _spelled(self) -> dict[str, Id]:
        return {str(number): number for number in self.captions}

    @cached_property
    def _named(self) -> dict[str, Id]:
        names = {number: PurePath(file).name for number, file in self.files.items()}
        counts = Counter(names.values())
        return {name: number for number, name in names.items() if counts[name] == 1}


def read_references(path: Path) -> References:
    """References of COCO's annotations. ValueError: no such file, another layout, no caption, one of no known image."""
    found = read_json(path)
    images, annotations = (objects(found, name) for name in ("images", "annotations"))
    if not images or not annotations or "caption" not in annotations[0]:
        raise ValueError(
            f"{path}: not COCO's annotations of captions: an object with images ([{{id, file_name}}]) and annotations "
            "([{image_id, caption}]) is expected"
        )
    captions: dict[Id, list[str]] = {}
    for entry in images:
        number = entry.get("id")
        if not isinstance(number, Id):
            raise ValueError(f"{path}: an image has no id: {entry!r:.80}")
        captions[number] = []
    if len(captions) < len(images):
        raise ValueError(f"{path}: {some(twice(entry['id'] for entry in images))} stands twice among the images")
    for entry in annotations:
        if (number := entry.get("image_id")) not in captions:
            raise ValueError(f"{path}: a caption of image {number!r}, which is not among its images")
        captions[number].append(text_of(entry, "caption", path))
    files = {entry["id"]: str(entry["file_name"]) for entry in images if entry.get("file_name")}
    return References(str(path), {number: texts for number, texts in captions.items() if texts}, files)


def read_results(path: Path, references: References, partial: bool = False) -> dict[Id, str]:
    """A caption for each image that has references, in their order; `partial`: of some.

    ValueError: no such file, another layout, no entry, an unknown image, one twice, one missing.
    """
    entries = read_entries(path, "COCO's results: a list of {image_id, caption}, or one such object a line")
    found: dict[Id, str] = {}
    unknown, again = list[Any](), list[Any]()
    for entry in entries:
        if "image_id" not in entry and "image" not in entry:
            raise ValueError(f"{path}: an entry has no image_id: {entry!r:.80}")
        number, text = references.find(entry), text_of(entry, "caption", path)
        if number is None:
            unknown.append(entry.get("image_id", entry.get("image")))
        elif number in found:
            again.append(number)
        else:
            found[number] = text
    if unknown:
        raise ValueError(f"{path}: {some(unknown)} not among the images with captions of {references.name}")
    if again:
        raise ValueError(f"{path}: several captions of {some(again)}; give one an image")
    missing = [number for number in references.captions if number not in found]
    if missing and not partial:
        raise ValueError(
            f"{path}: no caption of {some(missing)} of {references.name}; figures of a part are those of another set: "
            "--partial scores those that are there"
        )
    return {number: found[number] for number in references.captions if number in found}


def write_results(path: Path, captions: Mapping[Id, str]) -> None:
    """COCO's results, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        entries = [{"image_id": number, "caption": text} for number, text in captions.items()]
        draft.write_text(json.dumps(entries, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds. ValueError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_entries(path: Path, expected: str) -> list[Entry]:
    """The objects of a JSON list or of JSON lines. ValueError: none, something else; `expected` says what it is."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        parts = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: neither JSON nor JSON lines ({expected}): {error}") from None
    if not all(isinstance(entry, dict) for entry in parts):
        raise ValueError(f"{path}: not {expected}")
    if not parts:
        raise ValueError(f"{path}: empty; {expected} is expected")
    return list(parts)


def text_of(entry: Entry, field: str, path: Path) -> str:
    """A field that must be text. ValueError: it is missing, something else, or endless."""
    text = entry.get(field)
    if not isinstance(text, str):
        raise ValueError(f"{path}: {field} is {'missing' if text is None else 'no text'} in {entry!r:.80}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{path}: a {field} of {len(text)} characters, at most {MAX_CHARACTERS}: {text!r:.40}…")
    return text


def twice(values: Iterable[Any]) -> list[Any]:
    """What occurs more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def objects(found: Any, name: str) -> list[Entry]:
    """The list of objects of this name in a JSON object, or none."""
    listed = found.get(name) if isinstance(found, dict) else None
    return listed if isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed) else []


def some(numbers: Sequence[Any], what: str = "image") -> str:
    """Things in words: one by its id, several by their number and the first ids."""
    named = ", ".join(map(str, numbers[:SHOWN]))
    more = ", …" if len(numbers) > SHOWN else ""
    return f"{what} {named}" if len(numbers) == 1 else f"{len(numbers)} {what}s ({named}{more})"
