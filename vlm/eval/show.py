"""The best and the worst retrievals with their pictures, for the page.

Letters: N images, M texts, q queries shown, g candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.data.pictures import Pictures
from vlm.eval.features import Features
from vlm.eval.report import Entry, Match, Matches
from vlm.eval.retrieval import Ranks
from vlm.eval.thumbs import of_sample

Side = Literal["t2i", "i2t"]
WAYS: Mapping[Side, str] = {"t2i": "text → image", "i2t": "image → text"}
QUERIES, FOUND = 6, 5  # a section shows so many queries, and of each so many candidates
TRIED = 64  # queries at the first place among which the surest are looked for
CHUNK = 4096  # candidates scored at a time


@dataclass(frozen=True)
class Gallery:
    """A data set as the page shows it."""

    source: Pictures
    features: Features
    first: dict[int, int]  # of each id the first image

    @staticmethod
    def of(source: Pictures, features: Features) -> "Gallery":
        """Finds the first image of each id."""
        first: dict[int, int] = {}
        for image, number in enumerate(features.image_ids.tolist()):
            first.setdefault(number, image)
        return Gallery(source, features, first)

    def groups(self, side: Side) -> list[str]:
        """Of each query the name of the first image that shows what it is about."""
        return [self.features.names[image] for image in self._pictures(side)]

    def samples(self, side: Side) -> Int[Tensor, "n"]:
        """Of each query the place of the same image in the source."""
        return self.features.places.cpu()[torch.tensor(self._pictures(side))]

    def _pictures(self, side: Side) -> list[int]:
        ids = self.features.text_ids if side == "t2i" else self.features.image_ids
        return [self.first[number] for number in ids.tolist()]

    def scores(self, side: Side, queries: Int[Tensor, "q"]) -> Float[Tensor, "q g"]:
        """Cosines, the best over the vectors of an image."""
        image, text = self.features.image, self.features.text
        if side == "t2i":
            parts = [torch.einsum("nke,me->mnk", part, text[queries]).amax(2) for part in image.split(CHUNK)]
        else:
            parts = [torch.einsum("nke,me->nmk", image[queries], part).amax(2) for part in text.split(CHUNK)]
        return torch.cat(parts, 1)

    def right(self, side: Side, queries: Int[Tensor, "q"]) -> Bool[Tensor, "q g"]:
        """Which candidates fit."""
        image, text = self.features.image_ids, self.features.text_ids
        return text[queries][:, None] == image if side == "t2i" else image[queries][:, None] == text

    def caption(self, image: int) -> str:
        """The first text about an image."""
        number = int(self.features.image_ids[image])
        return self.features.strings[int((self.features.text_ids == number).nonzero()[0])]

    def thumbnail(self, image: int) -> bytes | None:
        """A small picture of an image."""
        return of_sample(self.source, int(self.features.places[image]))


@dataclass(frozen=True)
class Order:
    """How candidates of a query are put in order: by ITC, and the best `k` of these by `match` where it is given."""

    title: str
    ranks: Ranks
    k: int = 0
    match: Callable[[Tensor, Tensor], Tensor] | None = None

    def best(self, gallery: Gallery, side: Side, query: int, count: int) -> tuple[list[int], Float[Tensor, "g"]]:
        """The first `count` candidates, and the cosines of all."""
        cosines = gallery.scores(side, torch.tensor([query], device=gallery.features.image.device))[0]
        if self.match is None:
            return cosines.topk(min(count, len(cosines))).indices.tolist(), cosines
        found = cosines.topk(min(self.k, len(cosines))).indices
        same = torch.full_like(found, query)
        order = self.match(*((found, same) if side == "t2i" else (same, found))).argsort(descending=True)
        return found[order][:count].tolist(), cosines


def matches(gallery: Gallery, order: Order) -> list[Matches]:
    """The worst and the surest queries, both ways."""
    sections = []
    for side, arrow in WAYS.items():
        for title, queries in (
            ("The worst", worst(gallery, order, side)),
            ("The surest", surest(gallery, order, side)),
        ):
            rows = [_row(gallery, order, side, query) for query in queries]
            if rows:
                sections.append(Matches(f"{title}, {arrow}", rows, f"{order.title} {_NOTES[title]}"))
    return sections


_NOTES = {
    "The worst": "Queries whose best match stands furthest down, one a picture; that match is shown at the end.",
    "The surest": "Of the queries with a match in the first place, those where the next candidate is furthest behind.",
}


def worst(gallery: Gallery, order: Order, side: Side) -> list[int]:
    """Queries of the highest ranks above 1, one a picture."""
    ranks: Tensor = getattr(order.ranks, side)
    low = ranks.argsort(descending=True, stable=True)[: QUERIES * TRIED].tolist()
    return _one_a_picture(gallery, side, [query for query in low if int(ranks[query]) > 1])


def surest(gallery: Gallery, order: Order, side: Side) -> list[int]:
    """Queries at the first place, by how far behind the best of the wrong candidates is."""
    first = (getattr(order.ranks, side) == 1).nonzero().flatten()
    if not len(first):
        return []
    tried = first[torch.linspace(0, len(first) - 1, min(TRIED, len(first)), device=first.device).round().long()]
    scores, right = gallery.scores(side, tried), gallery.right(side, tried)
    lead = scores.masked_fill(~right, -torch.inf).amax(1) - scores.masked_fill(right, -1).amax(1)
    return _one_a_picture(gallery, side, tried[lead.argsort(descending=True)].tolist())


def _one_a_picture(gallery: Gallery, side: Side, queries: Sequence[int]) -> list[int]:
    ids = gallery.features.text_ids if side == "t2i" else gallery.features.image_ids
    chosen: dict[int, int] = {}
    for query in queries:
        chosen.setdefault(int(ids[query]), query)
    return list(chosen.values())[:QUERIES]


def _row(gallery: Gallery, order: Order, side: Side, query: int) -> Match:
    found, cosines = order.best(gallery, side, query, FOUND)
    right = gallery.right(side, torch.tensor([query], device=cosines.device))[0]
    rank = int(getattr(order.ranks, side)[query])
    entries = [_entry(gallery, side, one, f"{place}", cosines, right) for place, one in enumerate(found, 1)]
    if not any(entry.right for entry in entries):
        best = int(cosines.masked_fill(~right, -torch.inf).argmax())
        entries.append(_entry(gallery, side, best, f"{rank:,}", cosines, right))
    place = f"rank {rank:,} of {len(cosines):,}"
    if side == "t2i":
        return Match(Entry(gallery.features.strings[query], note=place), entries)
    return Match(Entry(gallery.caption(query), gallery.thumbnail(query), place), entries)


def _entry(gallery: Gallery, side: Side, one: int, place: str, cosines: Tensor, right: Tensor) -> Entry:
    note, fits = f"cosine {float(cosines[one]):.2f}", bool(right[one])
    if side == "t2i":
        return Entry(gallery.caption(one), gallery.thumbnail(one), note, fits, place)
    return Entry(gallery.features.strings[one], None, note, fits, place)
