"""One offline HTML page: facts, tables beside chance, curves, captioned pictures, queries with what was found.

Pictures are embedded, curves are drawn as SVG; there is no script and nothing to fetch. The template only places what
this module prepared; Jinja escapes every string on the way.
"""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from vlm.eval.chart import Number, Point, chart, shares

Directions = Mapping[str, Any]  # of "t2i" and "i2t" figures by name, as `vlm.eval.retrieval.summarize` gives them


@dataclass(frozen=True)
class Score:
    """A table cell drawn as number and bar, from 0 to `best`, with a mark where chance is."""

    value: Number
    chance: Number | None = None
    best: Number = 100
    unit: str = " %"
    digits: int = 1
    interval: tuple[Number, Number] | None = None  # in which it lies with 95 % confidence


@dataclass(frozen=True)
class Table:
    """Rows as long as the header; the first cell of each names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Score]]
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """One small chart per series of (step, value); `chance` gives some of them a dashed line."""

    title: str
    series: Mapping[str, Sequence[tuple[Number, Number]]]
    chance: Mapping[str, Number] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Card:
    """An encoded picture (PNG, WebP, JPEG or GIF), what the model wrote, what it should be, whether that is right.

    Without a picture, where it cannot be shown, the words alone.
    """

    image: bytes | None
    caption: str
    reference: str = ""
    correct: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Captioned pictures."""

    title: str
    cards: Sequence[Card]
    note: str = ""


@dataclass(frozen=True)
class Recalls:
    """Percentages against k, one chart a name, one line a method: of `chance` too, under the names of the charts."""

    title: str
    charts: Mapping[str, Mapping[str, Sequence[Point]]]
    chance: Mapping[str, Sequence[Point]]
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """What is asked with, or found: words, or a picture with words about it.

    `right`: whether it fits the query; `place`: its number among those found; `alt`: the picture in words, where those
    beside it do not say what it shows.
    """

    text: str
    image: bytes | None = None
    note: str = ""
    right: bool | None = None
    place: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Match:
    """A query and what was found for it, the best first."""

    query: Entry
    found: Sequence[Entry]


@dataclass(frozen=True)
class Matches:
    """Queries one below the other."""

    title: str
    rows: Sequence[Match]
    note: str = ""


Section = Table | Curves | Gallery | Recalls | Matches


@dataclass(frozen=True)
class Page:
    """A page from top to bottom. Blank lines separate paragraphs of `intro`; `credits` name sources and licences."""

    title: str
    intro: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    credits: Sequence[str] = ()


def write_page(path: Path, page: Page) -> None:
    """Write the page whole or not at all: an older page stays until the new one is complete. Makes missing folders."""
    text = render(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def render(page: Page) -> str:
    """The page as HTML. ValueError: a ragged table, or a picture of an unknown format."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("vlm.eval").joinpath("report.html.j2").read_text(encoding="utf-8")
    paragraphs = [part.strip() for part in page.intro.split("\n\n") if part.strip()]
    sections = [_section(section) for section in page.sections]
    return environment.from_string(source).render(page=page, paragraphs=paragraphs, sections=sections)


def retrieval_tables(measured: Mapping[str, Directions], chance: Directions, note: str = "") -> list[Table]:
    """Two tables, one a direction, from the summaries of `vlm.eval.retrieval` by method, such as {"ITC": …}."""
    titles = {"t2i": "Retrieval, text → image", "i2t": "Retrieval, image → text"}
    notes = {"t2i": "", "i2t": note}
    return [
        Table(titles[way], ["", "Chance", *measured], _measures(measured, chance, way), notes[way]) for way in titles
    ]


def _measures(measured: Mapping[str, Directions], chance: Directions, way: str) -> list[list[str | Score]]:
    rows: list[list[str | Score]] = []
    for name, floor in chance[way].items():
        values = [result[way][name] for result in measured.values()]
        if name.startswith("R@"):
            bars = [Score(value, floor) for value in values]
            rows.append([f"Recall@{name.removeprefix('R@')}", f"{floor:.1f} %", *bars])
        else:
            rows.append([name.replace("_", " ").capitalize(), *(f"{value:.1f}" for value in [floor, *values])])
    return rows


# What the template sees.

Cell = Mapping[str, str | Number | None]


def _section(section: Section) -> Mapping[str, object]:
    shared = {"kind": type(section).__name__, "title": section.title, "note": section.note}
    if isinstance(section, Table):
        for row in section.rows:
            if len(row) != len(section.header):
                raise ValueError(
                    f"table {section.title!r}: a row of {len(row)} cells under {len(section.header)} headings"
                )
        return shared | {"header": section.header, "rows": [[_cell(cell) for cell in row] for row in section.rows]}
    if isinstance(section, Curves):
        return shared | {"charts": [chart(name, s, section.chance.get(name)) for name, s in section.series.items()]}
    if isinstance(section, Recalls):
        return shared | {
            "charts": [shares(name, lines, section.chance[name]) for name, lines in section.charts.items()]
        }
    if isinstance(section, Matches):
        rows = [{"query": _entry(row.query), "found": [_entry(one) for one in row.found]} for row in section.rows]
        return shared | {"rows": rows}
    return shared | {"cards": [{"card": card, "source": _source(card.image)} for card in section.cards]}


def _entry(entry: Entry) -> Mapping[str, object]:
    return {"entry": entry, "source": _source(entry.image)}


def _source(image: bytes | None) -> str:
    return "" if image is None else _data_uri(image)


def _cell(cell: str | Score) -> Cell:
    """Text; for a score also the bar's length and the place of the chance mark, in percent of the bar."""
    if isinstance(cell, str):
        return {"text": cell, "bar": None}
    text = f"{cell.value:.{cell.digits}f}{cell.unit}"
    if not math.isfinite(cell.value):
        return {"text": "not finite", "bar": None}
    mark = None if cell.chance is None else _share(cell.chance, cell.best)
    label = text if cell.chance is None else f"{text}, chance {cell.chance:.{cell.digits}f}{cell.unit}"
    drawn: dict[str, str | Number | None] = {"text": text, "mark": mark, "label": label, "within": ""}
    drawn["bar"] = _share(cell.value, cell.best)
    if cell.interval is None:
        return drawn
    low, high = cell.interval
    within = f"{low:.{cell.digits}f}–{high:.{cell.digits}f}"
    start, end = _share(low, cell.best), _share(high, cell.best)
    drawn |= {"within": within, "start": start, "wide": round(end - start, 2)}
    return drawn | {"label": f"{label}, 95 % interval {within}"}


def _share(value: Number, best: Number) -> float:
    return round(100 * min(max(value / best, 0.0), 1.0), 2)


_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


def _data_uri(image: bytes) -> str:
    kind = "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else ""
    kind = kind or next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "")
    if not kind:
        raise ValueError(f"a picture of {len(image)} bytes is no PNG, WebP, JPEG or GIF; encode it as one of them")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
