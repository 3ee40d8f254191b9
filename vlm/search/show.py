"""What a search found: paths for other programs, JSON, or a contact sheet on the screen."""

import json as jsonlib
import os
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.data.image import BadSample, decode
from vlm.data.record import MAX_BYTES
from vlm.eval.sheet import SIDE, Cell, draw

CAPTION_BYTES = 2**16  # of a text beside a picture


@dataclass(frozen=True)
class Hit:
    """A file that was found: its path, how near it is, and if ITM was asked, what it says."""

    path: bytes
    score: float
    match: float | None = None

    @property
    def name(self) -> str:
        """The path as text; what is not UTF-8 in it as Python keeps it."""
        return os.fsdecode(self.path)


def show(query: Mapping[str, Any], hits: Sequence[Hit], null: bool, json: bool, sheet: bool) -> None:
    """Prints hits to standard output, a line each, or with a NUL behind each; with `sheet` also shows them."""
    lines = [_record(query, hit).encode() + b"\n" if json else hit.path + (b"\0" if null else b"\n") for hit in hits]
    try:
        sys.stdout.buffer.write(b"".join(lines))  # paths are bytes, in whatever encoding the system has them
        sys.stdout.flush()
    except BrokenPipeError:  # who read it has enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails at its own flush
        raise SystemExit(128 + signal.SIGPIPE) from None
    if sheet:
        _open(_sheet(hits))


def _record(query: Mapping[str, Any], hit: Hit) -> str:
    record = {**query, "path": hit.name, "score": round(hit.score, 6)}
    if hit.match is not None:
        record["match"] = round(hit.match, 6)
    if text := caption(Path(hit.name)):
        record["caption"] = text
    plain = jsonlib.dumps(record, ensure_ascii=False)
    return plain if _is_utf8(plain) else jsonlib.dumps(record)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption(picture: Path) -> str:
    """The first line of the .txt beside a picture; empty where there is none that can be read."""
    try:
        with picture.with_suffix(".txt").open("rb") as file:
            lines = file.read(CAPTION_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in lines if line.strip()), "")


def _sheet(hits: Sequence[Hit]) -> Path:
    """A contact sheet in the system's folder for such files, which it is left in: the viewer needs it yet."""
    handle, name = tempfile.mkstemp(prefix="vlm-search-", suffix=".png")
    os.close(handle)
    draw([_cell(hit) for hit in hits] or [Cell("nothing was found", [], None)]).save(name)
    return Path(name)


def _cell(hit: Hit) -> Cell:
    told = [f"{hit.score:.3f}", *([text] if (text := caption(Path(hit.name))) else [])]
    return Cell(os.path.basename(hit.name).encode("utf-8", "replace").decode(), [" ".join(told)], _small(hit))


def _small(hit: Hit) -> Image.Image | None:
    try:
        with open(hit.path, "rb") as file:
            image = decode(file.read(MAX_BYTES), least=lambda width, height: SIDE)
    except (BadSample, OSError):  # changed since it was indexed; its place on the sheet stays empty
        return None
    image.thumbnail((SIDE, SIDE))
    return image


def _open(sheet: Path) -> None:
    """In the viewer if there is a screen, else where it is."""
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not (screen and webbrowser.open(sheet.as_uri())):
        print(f"contact sheet: {sheet}", file=sys.stderr)
