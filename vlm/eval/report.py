"""One offline HTML page of a run: facts, tables beside chance, loss curves, captioned pictures.

Pictures are embedded, curves are drawn as SVG; there is no script and nothing to fetch. The template only places what
this module prepared; Jinja escapes every string on the way.
"""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import jinja2

Number = float | int
Directions = Mapping[str, Mapping[str, Number]]


@dataclass(frozen=True)
class Score:
    """A table cell drawn as number and bar, from 0 to `best`, with a mark where chance is."""

    value: Number
    chance: Number | None = None
    best: Number = 100
    unit: str = " %"
    digits: int = 1


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
    """An encoded picture (PNG, WebP, JPEG or GIF), what the model wrote, what it should be, whether that is right."""

    image: bytes
    caption: str
    reference: str = ""
    correct: bool | None = None


@dataclass(frozen=True)
class Gallery:
    """Captioned pictures."""

    title: str
    cards: Sequence[Card]
    note: str = ""


Section = Table | Curves | Gallery


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
        return shared | {"charts": [_chart(name, s, section.chance.get(name)) for name, s in section.series.items()]}
    return shared | {"cards": [{"card": card, "source": _data_uri(card.image)} for card in section.cards]}


def _cell(cell: str | Score) -> Cell:
    """Text; for a score also the bar's length and the place of the chance mark, in percent of the bar."""
    if isinstance(cell, str):
        return {"text": cell, "bar": None}
    text = f"{cell.value:.{cell.digits}f}{cell.unit}"
    if not math.isfinite(cell.value):
        return {"text": "not finite", "bar": None}
    mark = None if cell.chance is None else _share(cell.chance, cell.best)
    label = text if cell.chance is None else f"{text}, chance {cell.chance:.{cell.digits}f}{cell.unit}"
    return {"text": text, "bar": _share(cell.value, cell.best), "mark": mark, "label": label}


def _share(value: Number, best: Number) -> float:
    return round(100 * min(max(value / best, 0.0), 1.0), 2)


_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


def _data_uri(image: bytes) -> str:
    kind = "webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else ""
    kind = kind or next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "")
    if not kind:
        raise ValueError(f"a picture of {len(image)} bytes is no PNG, WebP, JPEG or GIF; encode it as one of them")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


# Charts: geometry in the units of the view box.

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 36
SMOOTH, RAW = 80, 300
Point = tuple[Number, Number]


@dataclass(frozen=True)
class _Axis:
    """Maps values from low..high to pixels from start..end."""

    low: Number
    high: Number
    start: Number
    end: Number

    def __call__(self, value: Number) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """(pixel, label) at round numbers: steps of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for m in (1, 2, 5, 10) if (step := m * power) >= 0.75 * rough)
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        digits = max(0, -math.floor(math.log10(step) + 1e-6))
        return [
            (self(n * step), _number(n * step) if step >= 100 else f"{n * step:.{digits}f}")
            for n in range(first, last + 1)
        ]


def _chart(name: str, series: Sequence[Point], chance: Number | None) -> Mapping[str, object]:
    """Lines, ticks and words of one series; values that are not finite are left out and counted."""
    points = [(float(step), float(value)) for step, value in series if math.isfinite(value)]
    shared = {"name": name, "lost": len(series) - len(points), "width": WIDTH, "height": HEIGHT, "chance": chance}
    if not points:
        return shared | {"line": ""}
    values = [value for _, value in points] + ([] if chance is None else [chance])
    x = _Axis(*_spread(points[0][0], points[-1][0]), LEFT, WIDTH - RIGHT)
    y = _Axis(*_range(min(values), max(values)), HEIGHT - BOTTOM, TOP)
    smooth = _means(points)
    raw = [] if len(points) <= SMOOTH else [p for bucket in _buckets(points, RAW) for p in _extremes(bucket)]
    return shared | {
        "line": _polyline(smooth, x, y),
        "raw": _polyline(raw, x, y),
        "dot": (x(smooth[-1][0]), y(smooth[-1][1])),
        "first": _number(smooth[0][1]),
        "last": _number(smooth[-1][1]),
        "chance_text": "" if chance is None else _number(chance),
        "chance_y": None if chance is None else y(chance),
        "x_ticks": x.ticks(5),
        "y_ticks": y.ticks(4),
        "box": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    }


def _range(low: Number, high: Number) -> tuple[Number, Number]:
    """From zero when the values come near it, otherwise tight; with some air above."""
    floor = 0.0 if 0 <= low < 0.6 * high else low - 0.05 * (high - low)
    return _spread(floor, high + 0.06 * (high - floor))


def _spread(low: Number, high: Number) -> tuple[Number, Number]:
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _buckets(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    edges = [at * len(points) // count for at in range(count + 1)]
    return [points[start:stop] for start, stop in pairwise(edges) if start < stop]


def _means(points: Sequence[Point]) -> list[Point]:
    """At most SMOOTH points, each the mean of its neighbours; few points stay as they are."""
    parts = _buckets(points, min(len(points), SMOOTH))
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def _extremes(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest, in order: thinning must not hide a spike."""
    return sorted({min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])})


def _polyline(points: Sequence[Point], x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x(step)},{y(value)}" for step, value in points)


def _number(value: Number) -> str:
    """Short: 1500 as 1.5k, 450, 4.85, 0.0042."""
    if abs(value) >= 1000:
        return f"{value / 1000:.1f}".removesuffix(".0") + "k"
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
