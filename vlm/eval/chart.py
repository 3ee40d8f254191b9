"""Geometry of the charts on a page, in the units of the view box: axes with round ticks, curves thinned or whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Number = float | int
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 36
SMOOTH, RAW = 80, 300
Point = tuple[Number, Number]


@dataclass(frozen=True)
class Axis:
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
            (self(n * step), number(n * step) if step >= 100 else f"{n * step:.{digits}f}")
            for n in range(first, last + 1)
        ]


def chart(name: str, series: Sequence[Point], chance: Number | None) -> Mapping[str, object]:
    """Lines, ticks and words of one series; values that are not finite are left out and counted."""
    points = [(float(step), float(value)) for step, value in series if math.isfinite(value)]
    shared = {"name": name, "lost": len(series) - len(points), "width": WIDTH, "height": HEIGHT, "chance": chance}
    if not points:
        return shared | {"line": ""}
    values = [value for _, value in points] + ([] if chance is None else [chance])
    x = Axis(*spread(points[0][0], points[-1][0]), LEFT, WIDTH - RIGHT)
    y = Axis(*around(min(values), max(values)), HEIGHT - BOTTOM, TOP)
    smooth = means(points)
    raw = [] if len(points) <= SMOOTH else [p for bucket in buckets(points, RAW) for p in extremes(bucket)]
    return shared | {
        "line": polyline(smooth, x, y),
        "raw": polyline(raw, x, y),
        "dot": (x(smooth[-1][0]), y(smooth[-1][1])),
        "first": number(smooth[0][1]),
        "last": number(smooth[-1][1]),
        "chance_text": "" if chance is None else number(chance),
        "chance_y": None if chance is None else y(chance),
        "x_ticks": x.ticks(5),
        "y_ticks": y.ticks(4),
        "box": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    }


def shares(name: str, lines: Mapping[str, Sequence[Point]], chance: Sequence[Point]) -> Mapping[str, object]:
    """Percentages against k, 1 and above, on a logarithmic axis; `chance` is a line like the others, drawn apart."""
    ends = [points[-1] for points in lines.values()]
    x = Axis(0, max(math.log10(max(k for k, _ in ends)), 0.3), LEFT, WIDTH - RIGHT)
    y = Axis(0, 100, HEIGHT - BOTTOM, TOP)

    def line(points: Sequence[Point]) -> str:
        return polyline([(math.log10(k), share) for k, share in points], x, y)

    powers = [m * 10**n for n in range(7) for m in (1, 2, 5) if math.log10(m * 10**n) <= x.high + 1e-9]
    ticks = powers if len(powers) <= 8 else [k for k in powers if str(k).startswith("1")]
    told = [f"{way} {points[0][1]:.1f} to {points[-1][1]:.1f} percent" for way, points in lines.items()]
    return {
        "name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "lines": [(way, line(points)) for way, points in lines.items()],
        "chance": line(chance),
        "label": f"{name}: {'; '.join(told)}; chance {chance[0][1]:.1f} to {chance[-1][1]:.1f} percent",
        "x_ticks": [(x(math.log10(k)), number(k) if k >= 1000 else str(k)) for k in ticks],
        "y_ticks": [(y(share), str(share)) for share in (0, 25, 50, 75, 100)],
        "box": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    }


def around(low: Number, high: Number) -> tuple[Number, Number]:
    """From zero when the values come near it, otherwise tight; with some air above."""
    floor = 0.0 if 0 <= low < 0.6 * high else low - 0.05 * (high - low)
    return spread(floor, high + 0.06 * (high - floor))


def spread(low: Number, high: Number) -> tuple[Number, Number]:
    """The same, or a range of 1 around a single value."""
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def buckets(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    """Neighbours together, as evenly as can be."""
    edges = [at * len(points) // count for at in range(count + 1)]
    return [points[start:stop] for start, stop in pairwise(edges) if start < stop]


def means(points: Sequence[Point]) -> list[Point]:
    """At most SMOOTH points, each the mean of its neighbours; few points stay as they are."""
    parts = buckets(points, min(len(points), SMOOTH))
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def extremes(points: Sequence[Point]) -> list[Point]:
    """The lowest and the highest, in order: thinning must not hide a spike."""
    return sorted({min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])})


def polyline(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """For the attribute of SVG."""
    return " ".join(f"{x(step)},{y(value)}" for step, value in points)


def number(value: Number) -> str:
    """Short: 1500 as 1.5k, 450, 4.85, 0.0042."""
    if abs(value) >= 1000:
        return f"{value / 1000:.1f}".removesuffix(".0") + "k"
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
