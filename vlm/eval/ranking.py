"""Retrieval as a task of `vlm evaluate`: ranks by ITC and re-ranked by ITM, and the sections of the page about them.

Letters: N images, M texts, P pairs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.eval.data import EvaluationData
from vlm.eval.features import Features, extract, match_pairs
from vlm.eval.measure import KS, RANK, intervals
from vlm.eval.outcome import Outcome
from vlm.eval.progress import counter
from vlm.eval.protocol import Protocol, mean_over_folds
from vlm.eval.report import Recalls, Score, Table
from vlm.eval.retrieval import Ranks, chance, rank_counts, rerank, summarize
from vlm.eval.show import WAYS, Gallery, Order, Side, matches
from vlm.model.vlm import VisionLanguageModel
from vlm.restore import Ready

T = TypeVar("T")
BINS = (1, 2, 5, 10, 50, 100, 500, 1000)  # ranks that end a row of the table of ranks
CURVE = 60  # points of a recall curve


@dataclass(frozen=True)
class Fold:
    """Images and texts that are ranked among each other; `ranks` by method: itc, and itm where it re-ranked."""

    model: VisionLanguageModel
    features: Features
    ranks: dict[str, Ranks]

    def match(self, image: Int[Tensor, "P"], text: Int[Tensor, "P"]) -> Float[Tensor, "P"]:
        """What re-ranking goes by."""
        return match_pairs(self.model, self.features, image, text)


@dataclass(frozen=True)
class Ranked:
    """A data set ranked by a model: all of it, or the folds of a protocol; the best `k` of each query re-ranked."""

    data: EvaluationData
    folds: Sequence[Fold]
    k: int
    bad: Counter[str]

    @property
    def methods(self) -> dict[str, str]:
        """Their names for people."""
        names = {"itc": "ITC", "itm": f"top {self.k} re-ranked by ITM"}
        return {way: names[way] for way in self.folds[0].ranks}

    def ranks(self, way: str, side: Side) -> Int[Tensor, "n"]:
        """Of all queries, fold after fold."""
        return torch.cat([getattr(fold.ranks[way], side) for fold in self.folds]).cpu()

    def summary(self, way: str) -> dict[str, Any]:
        """Figures of a method, the mean over the folds."""
        return mean_over_folds([summarize(fold.ranks[way]) for fold in self.folds])

    def chance(self, ks: Sequence[int] = KS) -> dict[str, Any]:
        """What a random ranking is expected to get."""
        parts = [fold.features for fold in self.folds]
        return mean_over_folds([chance(part.image_ids, part.text_ids, ks) for part in parts])

    @property
    def sizes(self) -> dict[Side, int]:
        """Candidates of a query, in the first fold."""
        features = self.folds[0].features
        return {"t2i": len(features.names), "i2t": len(features.strings)}

    @property
    def counts(self) -> dict[str, Any]:
        """Of all folds together."""
        pairs = {"images": "names", "captions": "strings"}
        told = {name: sum(len(getattr(fold.features, of)) for fold in self.folds) for name, of in pairs.items()}
        return told | {"unusable": dict(self.bad)}


def rank(trained: Ready, data: EvaluationData, k: int = 16, folder: Path | None = None) -> Ranked:
    """`folder` keeps the features, as of `extract`.

    ValueError: a model without a contrastive head; data of classes; no usable samples; features that are not finite.
    """
    model = trained.model
    if model.contrast is None:
        raise ValueError(f"{trained.name} was trained without itc, so it cannot rank images and texts")
    if data.labels is not None:
        remedy = "name --task classification"
        raise ValueError(f"--task retrieval: {data.source.files[0]} has classes in place of captions: {remedy}")
    loader = data.loader(trained)
    features = extract(model, loader, keep_tokens=model.match is not None, folder=folder)
    folds = [_ranked(model, part, k) for part in _folds(features, data.protocol)]
    return Ranked(data, folds, k, data.source.bad + loader.bad)


def _folds(features: Features, protocol: Protocol | None) -> Iterator[Features]:
    if protocol is None or protocol.folds == 1:
        yield features
        return
    places = features.places.cpu()
    for number in range(protocol.folds):
        fold = protocol.fold(number)
        yield features.select(((places >= fold.start) & (places < fold.stop)).nonzero().flatten())


def _ranked(model: VisionLanguageModel, features: Features, k: int) -> Fold:
    arguments = (features.image, features.text, features.image_ids, features.text_ids)
    fold = Fold(model, features, {"itc": rank_counts(*arguments)})
    if model.match is None:
        return fold
    images, texts = len(features.names), len(features.strings)
    pairs = images * min(k, texts) + texts * min(k, images)  # at most: those of both ways are asked once
    with counter(pairs, "re-ranking") as done:

        def match(image: Tensor, text: Tensor) -> Tensor:
            done(len(image))
            return fold.match(image, text)

        fold.ranks["itm"] = rerank(*arguments, match=match, k=k)
    return fold


def retrieval_task(trained: Ready, data: EvaluationData, k: int, seed: int, folder: Path | None = None) -> Outcome:
    """Recall both ways, by ITC and, if the model has the head, with the best `k` re-ranked by ITM; errors of `rank`."""
    ranked = rank(trained, data, k, folder)
    values = {f"{way}/{side}{RANK}": ranked.ranks(way, side) for way in ranked.methods for side in WAYS}
    galleries = [Gallery.of(data.source, fold.features) for fold in ranked.folds]
    groups = {side: [name for gallery in galleries for name in gallery.groups(side)] for side in WAYS}
    samples = {side: torch.cat([gallery.samples(side) for gallery in galleries]) for side in WAYS}
    queries: dict[Side, list[str]] = {
        "t2i": [text for fold in ranked.folds for text in fold.features.strings],
        "i2t": [name for fold in ranked.folds for name in fold.features.names],
    }
    within = intervals(values, _for_each(values, groups), seed, ranked.counts)
    return Outcome(
        metrics={way: ranked.summary(way) for way in ranked.methods},
        chance=ranked.chance(),
        counts=ranked.counts,
        protocol=protocol(ranked),
        values=values,
        groups=_for_each(values, groups),
        sections=[figures(ranked, within), curves(ranked), spread(ranked), *matches(galleries[0], _order(ranked))],
        queries=_for_each(values, queries),
        samples=_for_each(values, samples),
        intervals=within,
    )


def _for_each(values: Mapping[str, Tensor], of_side: Mapping[Side, T]) -> dict[str, T]:
    return {name: of_side[side] for name in values for side in WAYS if f"/{side}/" in name}


def _order(ranked: Ranked) -> Order:
    """The final one, in the first fold."""
    fold = ranked.folds[0]
    title = "" if len(ranked.folds) == 1 else f" In the first of {len(ranked.folds)} folds."
    if "itm" in fold.ranks:
        return Order(f"By ITC, {ranked.methods['itm']}.{title}", fold.ranks["itm"], ranked.k, fold.match)
    return Order(f"By ITC.{title}", fold.ranks["itc"])


def protocol(ranked: Ranked) -> dict[str, Any]:
    """What decides the figures."""
    told: dict[str, Any] = {
        "positives": "any of n: the rank of a query is that of its best match; equal ids match",
        "ties": "count against the model, and so do scores that rounding cannot tell apart",
    }
    if (standard := ranked.data.protocol) is not None:
        counts = ranked.counts
        told |= {"name": standard.name, "about": standard.about, "folds": standard.folds}
        told["deviations"] = standard.deviations(counts["images"], counts["captions"])
    if "itm" in ranked.methods:
        told |= {"rerank_k": ranked.k, "rerank_score": "ITM probability + ITC logit; what is not among the k stays"}
    return told


# The page.


def figures(ranked: Ranked, within: Mapping[str, tuple[float, float]]) -> Table:
    """Recalls with intervals, mean and median ranks, rSum, beside chance."""
    floor, found = ranked.chance(), {way: ranked.summary(way) for way in ranked.methods}
    rows: list[list[str | Score]] = []
    for side, arrow in WAYS.items():
        for name, guess in floor[side].items():
            if name.startswith("R@"):
                cells: list[str | Score] = [
                    Score(found[way][side][name], guess, interval=within[f"{way}/{side}/{name}"]) for way in found
                ]
                rows.append([f"{arrow} {name}", f"{guess:.1f} %", *cells])
            else:
                means = [f"{found[way][side][name]:.1f}" for way in found]
                rows.append([f"{arrow} {name.replace('_', ' ')}", f"{guess:.1f}", *means])
    rows.append(["rSum", f"{floor['rsum']:.1f}", *(f"{found[way]['rsum']:.1f}" for way in found)])
    note = "Any of several matches counts; ties count against the model. Below each recall its 95 % interval."
    return Table("Retrieval", ["", "Chance", *ranked.methods.values()], rows, note)


def curves(ranked: Ranked) -> Recalls:
    """Recall at every k up to the size of the gallery, at even steps of its logarithm."""
    charts, floor = {}, {}
    for side, arrow in WAYS.items():
        size = ranked.sizes[side]
        ks = sorted({round(size ** (i / (CURVE - 1))) for i in range(CURVE)})
        lines = {}
        for way, name in ranked.methods.items():
            values = ranked.ranks(way, side)
            lines[name] = [(k, 100 * float((values <= k).double().mean())) for k in ks]
        charts[arrow] = lines
        guess = ranked.chance(ks)[side]
        floor[arrow] = [(k, guess[f"R@{k}"]) for k in ks]
    return Recalls("Recall against k", charts, floor, "Percent of the queries with a match among the best k.")


def spread(ranked: Ranked) -> Table:
    """The histogram of the final ranks, as bars in a table, each with a mark where guessing is."""
    way, name = list(ranked.methods.items())[-1]
    size = max(ranked.sizes.values())
    ends = [*(end for end in BINS if end < size), size]
    below = ranked.chance(ends)
    rows: list[list[str | Score]] = []
    for first, last in zip([1, *(end + 1 for end in ends)], ends, strict=False):
        cells = []
        for side in WAYS:
            values = ranked.ranks(way, side)
            guess = below[side][f"R@{last}"] - (below[side][f"R@{first - 1}"] if first > 1 else 0)
            cells.append(Score(100 * float(((values >= first) & (values <= last)).double().mean()), guess))
        rows.append([f"{first}" if first == last else f"{first:,}–{last:,}", *cells])
    note = f"Percent of the queries by the rank of their best match, {name}; the marks are where guessing is."
    return Table("Ranks", ["rank", *WAYS.values()], rows, note)
