"""The same pictures and captions in every layout that can be read."""

import csv
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_files import picture, write
from vlm.data.pictures import Pictures
from vlm.data.sources import open_pictures

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
NAMES = [f"p{i:02d}" for i in range(32)]
CAPTIONS = {name: [f"picture {name}", f'the "{i}"th, a thing'][: 1 + i % 2] for i, name in enumerate(NAMES)}


def pictures(folder: Path) -> Path:
    """The pictures alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(picture(i))
    return folder


def rows() -> Iterator[tuple[str, str]]:
    """Picture and caption, a row for each caption."""
    return ((f"{name}.png", text) for name in NAMES for text in CAPTIONS[name])


def folder(place: Path) -> str:
    """`.txt` beside each."""
    pictures(place)
    for name, texts in CAPTIONS.items():
        (place / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(place)


def table(place: Path, delimiter: str, suffix: str) -> str:
    """A caption a row."""
    with (pictures(place) / f"all.{suffix}").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter=delimiter)
        out.writerow(["filepath", "title"])
        out.writerows(rows())
    return str(place / f"all.{suffix}")


def jsonl(place: Path) -> str:
    """All captions of a picture in a row."""
    lines = [json.dumps({"image": f"{name}.png", "caption": texts}) for name, texts in CAPTIONS.items()]
    (pictures(place) / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(place / "all.jsonl")


def parquet(place: Path) -> str:
    """A caption a row, small row groups."""
    import pyarrow
    from pyarrow import parquet as library

    images, texts = zip(*rows(), strict=True)
    content = pyarrow.table({"image": list(images), "caption": list(texts)})
    library.write_table(content, pictures(place) / "all.parquet", row_group_size=7)
    return str(place / "all.parquet")


def parquet_bytes(place: Path) -> str:
    """As Hugging Face's datasets store pictures."""
    import pyarrow
    from pyarrow import parquet as library

    place.mkdir()
    images = [{"bytes": picture(i), "path": f"{name}.png"} for i, name in enumerate(NAMES)]
    content = pyarrow.table({"image": images, "caption": list(CAPTIONS.values())})
    library.write_table(content, place / "train-00000.parquet", row_group_size=7)
    return str(place)


def save(place: Path, content: Any) -> str:
    """A JSON file beside the pictures."""
    (pictures(place) / "all.json").write_text(json.dumps(content), encoding="utf-8")
    return str(place / "all.json")


def coco(place: Path) -> str:
    """Captions apart from the pictures, in another order."""
    images = [{"id": 100 + i, "file_name": f"{name}.png", "height": 8} for i, name in enumerate(NAMES)]
    notes = [{"image_id": 100 + i, "caption": text} for i, name in enumerate(NAMES) for text in CAPTIONS[name]]
    notes.sort(key=lambda note: str(note["caption"]))
    return save(place, {"info": {}, "images": images, "annotations": notes})


def karpathy(place: Path) -> str:
    """One picture more, in another split."""
    entries: list[dict[str, Any]] = [
        {"filename": f"{name}.png", "split": "train", "sentences": [{"raw": text, "tokens": []} for text in texts]}
        for name, texts in [*CAPTIONS.items(), ("other", ["not for training"])]
    ]
    entries[-1]["split"] = "test"
    return save(place, {"dataset": "none", "images": entries}) + "#train"


def json_list(place: Path) -> str:
    """A list of objects."""
    return save(place, [{"image": f"{name}.png", "caption": texts} for name, texts in CAPTIONS.items()])


def token(place: Path) -> str:
    """Flickr30k's."""
    lines = [f"{name}.png#{i}\t{text}" for name in NAMES for i, text in enumerate(CAPTIONS[name])]
    (pictures(place) / "results.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(place / "results.token")


def shards(place: Path) -> str:
    """Two tars."""
    place.mkdir()
    samples = [
        {"__key__": name, "png": picture(i), "txt": "\n".join(CAPTIONS[name]), "json": {"picture": f"{name}.png"}}
        for i, name in enumerate(NAMES)
    ]
    write(place / "0.tar", samples[:20])
    write(place / "1.tar", samples[20:])
    return str(place)


def img2dataset(place: Path) -> str:
    """As img2dataset leaves it: tars with what it knows of each, and tables and counts beside them."""
    place.mkdir()
    samples = [
        {
            "__key__": name,
            "png": picture(i),
            "txt": "\n".join(CAPTIONS[name]),
            "json": {"key": name, "picture": f"{name}.png", "status": "success", "url": f"https://example.org/{name}"},
        }
        for i, name in enumerate(NAMES)
    ]
    for number, part in enumerate((samples[:20], samples[20:])):
        write(place / f"{number:05d}.tar", part)
        (place / f"{number:05d}.parquet").write_bytes(b"PAR1 is not read")
        (place / f"{number:05d}_stats.json").write_text('{"count": 20, "successes": 20}')
    return str(place)


LAYOUTS: dict[str, Callable[[Path], str]] = {
    "folder": folder,
    "csv": lambda place: table(place, ",", "csv"),
    "tsv": lambda place: table(place, "\t", "tsv"),
    "pipes": lambda place: table(place, "|", "txt"),
    "jsonl": jsonl,
    "parquet": parquet,
    "parquet bytes": parquet_bytes,
    "coco": coco,
    "karpathy": karpathy,
    "json list": json_list,
    "token": token,
    "shards": shards,
    "img2dataset": img2dataset,
}


def talk(place: Path, chat: bool, lines: bool) -> str:
    """LLaVA's conversations about each picture: the answers are its captions."""
    records = []
    for name, texts in CAPTIONS.items():
        turns: list[dict[str, Any]] = []
        for text in texts:
            asked: Any = [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "What is it?"}]
            turns += (
                [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
                if chat
                else [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}]
            )
        records.append({"messages": turns} if chat else {"id": name, "image": f"{name}.png", "conversations": turns})
    if not lines:
        return save(place, records)
    (pictures(place) / "all.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(place / "all.jsonl")


def marked(layouts: Iterable[str]) -> list[Any]:
    """Layouts as parameters of a test, in order; those that need pyarrow are skipped without it."""
    return [pytest.param(name, marks=[needs_pyarrow] if "parquet" in name else []) for name in sorted(layouts)]


def made(image: bytes, name: str, place: Path) -> Pictures:
    """A folder with one picture."""
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(image)
    (place / name).with_suffix(".txt").write_text("a thing")
    return open_pictures(str(place))


def snapshot(place: Path) -> dict[str, bytes]:
    """What a folder holds."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
