"""Retrieval as a task of `vlm evaluate`: ranks by ITC and re-ranked by ITM, and the sections of the page about them.

Letters: N images, M texts, P pairs.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm import build_data
from vlm.data.pictures import Pictures
from vlm.data.sources import Source
from vlm.eval.features import Features, extract, match_pairs
from vlm.eval.measure import KS, RANK, intervals
from vlm.eval.outcome import Outcome
from vlm.eval.report import Recalls, Score, Section, Table
from vlm.eval.retrieval import Ranks, Summary, chance, rank_counts, rerank, summarize
from vlm.eval.show import Gallery, Order, matches
from vlm.model.vlm import VisionLanguageModel
from vlm.restore import Ready

T = TypeVar("T")
WAYS = {"t2i": "text → image", "i2t": "image → text"}
BINS = (1, 2, 5, 10, 50, 100, 500, 1000)  # ranks that end a row of the table of ranks
CURVE = 60  # points of a recall curve


@dataclass(frozen=True)
class Ranked:
    """A data set ranked by a model; `ranks` by method: itc, and itm where it re-ranked the best `k`."""

    model: VisionLanguageModel
    source: Pictures
    features: Features
    ranks: dict[str, Ranks]
    k: int
    bad: Counter[str]

    def chance(self, ks: Sequence[int] = KS) -> Summary:
        """What a random ranking is expected to get."""
        return chance(self.features.image_ids, self.features.text_ids, ks)

    def match(self, image: Int[Tensor, "P"], text: Int[Tensor, "P"]) -> Float[Tensor, "P"]:
        """What re-ranking goes by."""
        return match_pairs(self.model, self.features, image, text)


def rank(trained: Ready, shards: Sequence[str], caption: str | None = None, k: int = 16) -> Ranked:
    """`caption`: where its captions stand (the model's own setting unless given).

    ValueError: a model without a contrastive head; data without usable samples; features that are not finite.
    """
    model = trained.model
    if model.contrast is None:
        raise ValueError(f"{trained.name} was trained without itc, so it cannot rank images and texts")
    source = open_source(trained, shards, caption)
    if isinstance(source, Source):
        print(source.about, file=sys.stderr)
    transform = build_data.transform(trained.vision, model, source)
    loader = build_data.evaluation_loader(trained.data, source, transform, trained.tokenizer, trained.batch_size)
    features = extract(model, loader, keep_tokens=model.match is not None)
    arguments = (features.image, features.text, features.image_ids, features.text_ids)
    ranked = Ranked(model, source, features, {"itc": rank_counts(*arguments)}, k, source.bad + loader.bad)
    if model.match is not None:
        ranked.ranks["itm"] = rerank(*arguments, match=ranked.match, k=k)
    return ranked


def open_source(trained: Ready, shards: Sequence[str], caption: str | None) -> Pictures:
    """The data, read as the model's own, but for `caption` where given."""
    data = trained.data
    return build_data.shards(data.model_copy(update={"caption": caption or data.caption}), list(shards))


def retrieval_task(trained: Ready, shards: Sequence[str], caption: str | None, k: int, seed: int) -> Outcome:
    """Recall both ways, by ITC and, if the model has the head, with the best `k` re-ranked by ITM; errors of `rank`."""
    ranked = rank(trained, shards, caption, k)
    features, ranks = ranked.features, ranked.ranks
    values = {f"{way}/{side}{RANK}": getattr(ranks[way], side).cpu() for way in ranks for side in WAYS}
    gallery = Gallery.of(ranked.source, features)
    about = {"t2i": gallery.pictures("t2i"), "i2t": gallery.pictures("i2t")}
    groups = _for_each(values, {side: [features.names[image] for image in about[side]] for side in WAYS})
    found = {way: summarize(given) for way, given in ranks.items()}
    within = intervals(values, groups, seed)
    order = Order("By ITC", ranks["itc"])
    if "itm" in ranks:
        order = Order(f"By ITC, {titles(ranked)['itm']}", ranks["itm"], k, ranked.match)
    return Outcome(
        metrics={name: value for way in found for name, value in _flat(found[way], f"{way}/").items()},
        chance=_flat(ranked.chance()),
        counts={"images": len(features.names), "captions": len(features.strings), "unusable": dict(ranked.bad)},
        protocol=protocol(ranked),
        values=values,
        groups=groups,
        sections=[*tables(ranked, found, within), *matches(gallery, order)],
        queries=_for_each(values, {"t2i": features.strings, "i2t": features.names}),
        samples=_for_each(values, {side: features.places.cpu()[torch.tensor(about[side])] for side in WAYS}),
        intervals=within,
    )


def _for_each(values: Mapping[str, Tensor], of_side: Mapping[str, T]) -> dict[str, T]:
    return {name: of_side[name.split("/")[1]] for name in values}


def protocol(ranked: Ranked) -> dict[str, object]:
    """What decides the figures."""
    told: dict[str, object] = {
        "positives": "any of n: the rank of a query is that of its best match; equal ids match",
        "ties": "count against the model, and so do scores that rounding cannot tell apart",
    }
    if "itm" in ranked.ranks:
        told |= {"rerank_k": ranked.k, "rerank_score": "ITM probability + ITC logit; what is not among the k stays"}
    return told


def _flat(summary: Summary, prefix: str = "") -> dict[str, float]:
    """Names as "t2i/R@1"; rSum is the sum of the six recalls."""
    flat = {f"{prefix}{way}/{name}": value for way, each in summary.items() for name, value in each.items()}
    recalls = [value for name, value in flat.items() if "/R@" in name]
    return flat | {f"{prefix}rSum": sum(recalls)}


# The page.


def titles(ranked: Ranked) -> dict[str, str]:
    """The methods for people."""
    names = {"itc": "ITC", "itm": f"top {ranked.k} re-ranked by ITM"}
    return {way: names[way] for way in ranked.ranks}


def tables(ranked: Ranked, found: dict[str, Summary], within: dict[str, tuple[float, float]]) -> list[Section]:
    """Figures beside chance, recall curves, how the ranks are spread."""
    return [figures(ranked, found, within), curves(ranked), spread(ranked)]


def figures(ranked: Ranked, found: dict[str, Summary], within: dict[str, tuple[float, float]]) -> Table:
    """Recalls with intervals, mean and median ranks, rSum."""
    floor, names = ranked.chance(), titles(ranked)
    rows: list[list[str | Score]] = []
    for side, arrow in WAYS.items():
        for name, guess in floor[side].items():
            if name.startswith("R@"):
                cells: list[str | Score] = [
                    Score(found[way][side][name], guess, interval=within[f"{way}/{side}/{name}"]) for way in names
                ]
                rows.append([f"{arrow}, {name}", f"{guess:.1f} %", *cells])
            else:
                means = [f"{found[way][side][name]:.1f}" for way in names]
                rows.append([f"{arrow}, {name.replace('_', ' ')}", f"{guess:.1f}", *means])
    sums = [_flat(floor)["rSum"], *(_flat(found[way])["rSum"] for way in names)]
    rows.append(["rSum", *(f"{value:.1f}" for value in sums)])
    note = "Any of several matches counts; ties count against the model. Below each recall its 95 % interval."
    return Table("Retrieval", ["", "Chance", *names.values()], rows, note)


def curves(ranked: Ranked) -> Recalls:
    """Recall at every k up to the size of the gallery, at round steps of its logarithm."""
    sizes = {"t2i": len(ranked.features.names), "i2t": len(ranked.features.strings)}
    charts, floor = {}, {}
    for side, arrow in WAYS.items():
        ks = sorted({round(sizes[side] ** (i / (CURVE - 1))) for i in range(CURVE)})
        lines = {}
        for way, name in titles(ranked).items():
            values = getattr(ranked.ranks[way], side)
            lines[name] = [(k, 100 * float((values <= k).double().mean())) for k in ks]
        charts[arrow] = lines
        guess = ranked.chance(ks)[side]
        floor[arrow] = [(k, guess[f"R@{k}"]) for k in ks]
    return Recalls("Recall against k", charts, floor, "Percent of the queries with a match among the best k.")


def spread(ranked: Ranked) -> Table:
    """The histogram of the final ranks, as bars in a table, each with a mark where guessing is."""
    way, name = list(titles(ranked).items())[-1]
    size = max(len(ranked.features.names), len(ranked.features.strings))
    ends = [*(end for end in BINS if end < size), size]
    below = ranked.chance(ends)
    rows: list[list[str | Score]] = []
    for first, last in zip([1, *(end + 1 for end in ends)], ends, strict=False):
        cells = []
        for side in WAYS:
            values = getattr(ranked.ranks[way], side)
            guess = below[side][f"R@{last}"] - (below[side][f"R@{first - 1}"] if first > 1 else 0)
            cells.append(Score(100 * float(((values >= first) & (values <= last)).double().mean()), guess))
        rows.append([f"{first}" if first == last else f"{first:,}–{last:,}", *cells])
    note = f"Percent of the queries by the rank of their best match, {name}; the marks are where guessing is."
    return Table("Ranks", ["rank", *WAYS.values()], rows, note)
