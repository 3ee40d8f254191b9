"""Zero-shot classification on the page: a table beside chance, a bar for each class, the clearest and the worst.

Letters: N images.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from vlm.data.image import decode
from vlm.data.pictures import Pictures
from vlm.eval.report import Card, Gallery, Score, Section, Table

SHOWN, BARS, SIDE = 8, 40, 240  # pictures of either kind; classes with a bar; pixels of a picture's longer side
_MEASURES = {"top1": "Top-1", "top5": "Top-5", "mean_per_class_recall": "Mean per class"}


@dataclass(frozen=True)
class Classified:
    """Of each image: the rank of its class (1 = first), the class it was taken for, by how much its own is ahead."""

    rank: Int[Tensor, "N"]
    taken_for: Int[Tensor, "N"]
    margin: Float[Tensor, "N"]


def cards(
    source: Pictures, places: Int[Tensor, "N"], found: Classified, label: Int[Tensor, "N"], names: Sequence[str]
) -> tuple[list[Card], list[Card]]:
    """Pictures that are furthest ahead of all other classes, and those that are furthest behind one."""
    order = found.margin.argsort(stable=True).tolist()

    def card(row: int) -> Card:
        taken, true = int(found.taken_for[row]), int(label[row])
        return Card(_small(source.raw(int(places[row])).image), names[taken], names[true], taken == true)

    half = min(SHOWN, -(-len(order) // 2))
    return [card(row) for row in order[::-1][:half]], [card(row) for row in order[:half]]


def sections(
    metrics: Mapping[str, Any], chance: Mapping[str, float | None], shown: tuple[Sequence[Card], Sequence[Card]]
) -> list[Section]:
    """Of the report, the table first."""
    rows: list[Sequence[str | Score]] = [
        [title, f"{chance[name]:.1f} %", Score(metrics[name], chance[name])]
        for name, title in _MEASURES.items()
        if metrics[name] is not None
    ]
    always = f"Always naming the most frequent class would be right for {chance['most_frequent_class']:.1f} %."
    best, worst = shown
    return [
        Table("Zero-shot classification", ["", "Chance", "Right"], rows, f"Ties count against the model. {always}"),
        _bars(metrics["per_class"], chance["top1"]),
        Gallery("Furthest ahead of all other classes", best),
        Gallery("Furthest behind another class", worst),
    ]


def _bars(classes: Sequence[Mapping[str, Any]], floor: float | None) -> Table:
    """From the best class to the worst; of many, both ends."""
    there = sorted((one for one in classes if one["images"]), key=lambda one: (-one["top1"], one["class"]))
    kept = there if len(there) <= BARS else [*there[: BARS // 2], *there[-BARS // 2 :]]
    rows: list[Sequence[str | Score]] = [
        [one["class"], str(one["images"]), Score(one["top1"], floor), one["often_taken_for"] or ""] for one in kept
    ]
    left = f"The best {BARS // 2} and the worst {BARS // 2} of {len(there)} classes." if len(there) > BARS else ""
    return Table("Each class", ["", "Pictures", "Right", "If wrong, mostly taken for"], rows, left)


def _small(data: bytes) -> bytes:
    """A picture as the page embeds it: upright, at most SIDE pixels, WebP."""
    image = decode(data)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85)
    return out.getvalue()
