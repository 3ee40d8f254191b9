"""Names of classes and templates around them, from text and JSON files: data that is put together, never run."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = "a photo of a {c}."  # unless others are given
_MARKS = ("{c}", "{}")  # CLIP_benchmark's, OpenAI's


@dataclass(frozen=True)
class Classes:
    """Classes by number, with all the texts that describe each."""

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]

    @property
    def repeated(self) -> list[str]:
        """Names that several classes have."""
        return [name for name, count in Counter(self.names).items() if count > 1]


def describe(names: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]]) -> Classes:
    """Each template filled with each name; or, by name, its own texts as they are.

    ValueError: fewer than two classes, a template without a place for the name, a class without texts.
    """
    if len(names) < 2:
        raise ValueError(f"zero-shot classification needs two classes at least, not {len(names)}: {', '.join(names)}")
    if isinstance(templates, Mapping):
        if missing := [name for name in names if not templates.get(name)]:
            raise ValueError(f"--templates: no text for {missing[0]!r} ({len(missing)} of {len(names)} classes)")
        return Classes(tuple(names), tuple(tuple(templates[name]) for name in names))
    return Classes(tuple(names), tuple(tuple(_filled(line, name) for line in templates) for name in names))


def _filled(template: str, name: str) -> str:
    for mark in _MARKS:
        template = template.replace(mark, name)
    return template


def read_names(spec: str) -> list[str]:
    """Class names by number: a line each, a JSON list, or that under a name in a JSON object (FILE.json#imagenet1k)."""
    found = _content(spec, "--classes")
    if not isinstance(found, list):
        raise ValueError(f"--classes {spec}: {_shape(found)}; should be a list of names{_entries(spec, found)}")
    return found


def read_templates(spec: str) -> list[str] | dict[str, list[str]]:
    """As `read_names`: a {c} or {} stands for the name; or a JSON object of texts by class (CuPL's form)."""
    found = _content(spec, "--templates")
    if isinstance(found, dict):
        for name, texts in found.items():
            _strings(texts, f"--templates {spec}: {name}")
        return found
    for number, line in enumerate(found, 1):
        if not any(mark in line for mark in _MARKS):
            raise ValueError(f"--templates {spec}: template {number}, {line!r}, has no {{c}} where the name belongs")
    return list(found)


def _content(spec: str, option: str) -> Any:
    """Lines of a text file; a list of strings or an object from JSON."""
    path, entry = _split(spec)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {spec}: not UTF-8: {error}") from None
    if path.suffix.lower() != ".json":
        return _strings([line.strip() for line in text.rstrip().split("\n")], f"{option} {spec}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {spec}: not JSON: {error}") from None
    if entry:
        if not isinstance(found, dict) or entry not in found:
            raise ValueError(f"{option} {spec}: no {entry!r} in it{_entries(str(path), found)}")
        found = found[entry]
    return found if isinstance(found, dict) else _strings(found, f"{option} {spec}")


def _split(spec: str) -> tuple[Path, str]:
    name, mark, entry = spec.rpartition("#")
    if mark and name.lower().endswith(".json") and not Path(spec).expanduser().exists():
        return Path(name).expanduser(), entry
    return Path(spec).expanduser(), ""


def _strings(found: Any, where: str) -> list[str]:
    """ValueError for anything but full strings: a line left empty would move all numbers after it."""
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}: {_shape(found)}; should be a list of texts")
    for number, text in enumerate(found, 1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: entry {number} is {text!r}; should be text")
    return found


def _shape(found: Any) -> str:
    return "an empty list" if found == [] else "an object" if isinstance(found, dict) else type(found).__name__


def _entries(spec: str, found: Any) -> str:
    if not isinstance(found, dict):
        return ""
    names = list(found)[:8]
    return f"; name one of its entries, such as {spec}#{names[0]} ({', '.join(names)})" if names else ""
