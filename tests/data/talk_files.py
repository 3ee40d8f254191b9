"""The same conversations in every form that can be read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.data.shard_files import picture

COUNT = 12
SHOWN = (2, 1, 0)  # pictures of the conversations, in turn


def names(number: int) -> list[str]:
    """Of the pictures of a conversation."""
    return [f"p{number:02d}{letter}.png" for letter in "abc"[: SHOWN[number % 3]]]


def said(number: int) -> list[str]:
    """Question, answer, question, answer; the pictures stand at the marks."""
    first = ("Is <image> as <image>?", "<image>\nWhat is it?", "Who are you?")[number % 3]
    return [first, f"it is thing {number}", "Why?", f"because of {number}"]


def llava(number: int) -> dict[str, Any]:
    """A record as LLaVA's."""
    speakers = ("human", "gpt") * 2
    turns = [{"from": who, "value": text} for who, text in zip(speakers, said(number), strict=True)]
    shown = names(number)
    image = {} if not shown else {"image": shown[0] if len(shown) == 1 else shown}
    return {"id": f"talk {number}", **image, "conversations": turns}


def chat(number: int) -> dict[str, Any]:
    """A record of messages, the pictures among their parts."""
    shown, messages = iter(names(number)), []
    for who, text in zip(("user", "assistant") * 2, said(number), strict=True):
        content: Any = text
        if "<image>" in text:
            pieces = text.split("<image>")
            content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
            for piece in pieces[1:]:
                content += [{"type": "image", "image": next(shown)}, {"type": "text", "text": piece}]
        messages.append({"role": who, "content": content})
    return {"id": f"talk {number}", "messages": messages}


def pictures(folder: Path) -> Path:
    """All of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(name for number in range(COUNT) for name in names(number)):
        (folder / name).write_bytes(picture(seed))
    return folder


def as_json(folder: Path, make: Callable[[int], dict[str, Any]] = llava) -> str:
    """One list."""
    path = pictures(folder) / "talks.json"
    path.write_text(json.dumps([make(number) for number in range(COUNT)]), encoding="utf-8")
    return str(path)


def as_lines(folder: Path, make: Callable[[int], dict[str, Any]] = chat) -> str:
    """One a line."""
    path = pictures(folder) / "talks.jsonl"
    path.write_text("\n".join(json.dumps(make(number)) for number in range(COUNT)), encoding="utf-8")
    return str(path)


def as_parquet(folder: Path, inside: bool) -> str:
    """Small row groups; the pictures `inside` the table, or paths."""
    from pyarrow import Table, parquet

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(COUNT):
            record = llava(number)
            record.pop("image", None)
            shown = names(number)
            held = [{"bytes": (folder / name).read_bytes(), "path": name} for name in shown]
            yield {**record, "images": held if inside else shown}

    pictures(folder)
    parquet.write_table(Table.from_pylist(list(rows())), folder / "talks.parquet", row_group_size=5)
    return str(folder / "talks.parquet")
