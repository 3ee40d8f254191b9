"""Image-text retrieval: exact ranks in tiles (never N x M), recall, chance level, re-ranking by a match score.

Images and texts that carry the same id describe each other: any number of captions per image and images per caption.
The rank of a query is that of its best positive: 1 + the number of other candidates that score at least as much (the
"any of n" rule of Karpathy & Fei-Fei 2015). Ties count against the model, so a collapsed encoder gets the worst rank,
not the best; scores that rounding cannot tell apart are ties.

Letters: N images, M texts, Q vectors per image (Q-Former; 1 for CLIP), E their width, P pairs, K or L candidates kept.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.eval.screen import Extent, Screen, Tile, best_of, reached
from vlm.nn.backend import bfloat16_is_fast, fast_float32

Match = Callable[[Int[Tensor, "P"], Int[Tensor, "P"]], Float[Tensor, "P"]]
Summary = dict[str, Any]  # what `summarize` gives
UNEVEN = 1000.0  # times the median norm that a vector may have
SMALL = 1e-20  # scores from which on no product in them is rounded to zero
LARGEST = 2**16  # side of a tile: fp32 counts its ones exactly, up to 2^24


@dataclass(frozen=True)
class Ranks:
    """Rank of the best positive, 1 = first: of each text among the images, of each image among the texts."""

    t2i: Int[Tensor, "M"]
    i2t: Int[Tensor, "N"]


def rank_counts(
    image: Float[Tensor, "N Q E"],
    text: Float[Tensor, "M E"],
    image_ids: Int[Tensor, "N"],
    text_ids: Int[Tensor, "M"],
    chunk: int = 2048,
) -> Ranks:
    """Ranks in both directions from one pass over the scores, max over Q of image . text.

    `chunk` bounds a tile to about chunk x chunk scores; it changes speed and memory, not the ranks. Where the CPU has
    instructions for bf16, a product in it finds which scores need one in fp32 (`vlm.eval.screen`): the same ranks, but
    that of two sums in fp32 either may round a score to the one or the other side of where a tie ends.
    ValueError: features that are not finite, or a query without any positive.
    """
    with fast_float32():
        return _Pool(image, text, image_ids, text_ids, chunk).ranks()


def rerank(
    image: Float[Tensor, "N Q E"],
    text: Float[Tensor, "M E"],
    image_ids: Int[Tensor, "N"],
    text_ids: Int[Tensor, "M"],
    match: Match,
    k: int,
    chunk: int = 1024,
    pairs: int = 256,
) -> Ranks:
    """Ranks after `match` orders the best `k` candidates of each query anew; the rest stay below in their order.

    `match(image_index, text_index)` gives one score per pair (ITM logit, or its sum with the ITC score as in BLIP). It
    is asked once for each pair that either direction needs, image by image, at most `pairs` at a time. Equal match
    scores count against the model, exactly as in `rank_counts`: a match head that says nothing earns nothing.
    ValueError: as `rank_counts`; k < 1; a match score that is not finite.
    """
    if k < 1 or pairs < 1:
        raise ValueError(f"rerank: k={k}, pairs={pairs}: both must be at least 1")
    with fast_float32():
        pool = _Pool(image, text, image_ids, text_ids, chunk)
        before = pool.ranks()
        images_of, texts_of = pool.shortlists(k)
    t2i_pairs = images_of * len(text_ids) + torch.arange(len(text_ids), device=text.device)[:, None]
    i2t_pairs = torch.arange(len(image_ids), device=text.device)[:, None] * len(text_ids) + texts_of
    asked = torch.cat([t2i_pairs.flatten(), i2t_pairs.flatten()]).unique()
    answers = _ask(match, asked, len(text_ids), pairs)
    t2i_match = answers[torch.searchsorted(asked, t2i_pairs)]
    i2t_match = answers[torch.searchsorted(asked, i2t_pairs)]
    return Ranks(
        t2i=_rank_in_shortlist(t2i_match, image_ids[images_of] == text_ids[:, None], before.t2i),
        i2t=_rank_in_shortlist(i2t_match, text_ids[texts_of] == image_ids[:, None], before.i2t),
    )


def summarize(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> Summary:
    """{"t2i" | "i2t": {"R@k": percent of queries of rank <= k, "mean_rank", "median_rank"}, "rsum": all R@k together}.

    "t2i" has texts as queries and images as gallery, "i2t" the other way round.
    """

    def one(rank: Tensor) -> dict[str, float]:
        values = rank.cpu().numpy()
        recall = {f"R@{k}": float(100 * (values <= k).mean()) for k in ks}
        return recall | {"mean_rank": float(values.mean()), "median_rank": float(np.median(values))}

    return _with_sum(one(ranks.t2i), one(ranks.i2t))


def chance(image_ids: Int[Tensor, "N"], text_ids: Int[Tensor, "M"], ks: Sequence[int] = (1, 5, 10)) -> Summary:
    """What a random ranking is expected to get, in the form of `summarize` (exact, any number of positives)."""
    images_per_text = _positives(text_ids, image_ids, "text", "image")
    texts_per_image = _positives(image_ids, text_ids, "image", "text")
    return _with_sum(
        _chance_one_way(images_per_text, len(image_ids), ks), _chance_one_way(texts_per_image, len(text_ids), ks)
    )


def _with_sum(t2i: dict[str, float], i2t: dict[str, float]) -> Summary:
    recalls = [value for way in (t2i, i2t) for name, value in way.items() if name.startswith("R@")]
    return {"t2i": t2i, "i2t": i2t, "rsum": sum(recalls)}


class _Sorted:
    """Vectors in the order of their ids, in fp32 at least; given out in parts, so that nothing is a copy of all."""

    def __init__(self, vectors: Float[Tensor, "n *rest"], ids: Int[Tensor, "n"], dtype: torch.dtype) -> None:
        assert len(vectors) == len(ids), "one id per image and per text"
        self.vectors, self.dtype = vectors.detach(), dtype
        self.order = ids.argsort(stable=True)
        self.ids = ids[self.order]
        self.as_given = bool((ids[1:] >= ids[:-1]).all())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Float[Tensor, "p *rest"]:
        return (self.vectors[part] if self.as_given else self.vectors[self.order[part]]).to(self.dtype)

    def unsort(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, self.order, values)

    def extent(self, name: str) -> Extent:
        """How far vectors reach. ValueError: one that is not finite, or beyond all measure of the others."""
        slices = list(_slices(len(self), 1024))
        norms = torch.cat([torch.linalg.vector_norm(self[part], dim=-1).flatten() for part in slices])
        if bad := int((~norms.isfinite()).sum()):
            raise ValueError(
                f"retrieval: {bad} of {len(norms)} {name} vectors are not finite (NaN, infinite or too large)"
            )
        longest, middle = float(norms.max()), float(norms.median())
        if middle and longest > UNEVEN * middle:
            raise ValueError(
                f"retrieval: the longest {name} vector is {longest / middle:.0f} times as long as half of them, and "
                "what rounding does to its scores would make ties of all others: normalise them"
            )
        return Extent(longest, max(Extent.of(self[part]).lost for part in slices))


class _Pool:
    """Both galleries sorted by id, so that the positives of neighbouring queries are one contiguous range."""

    def __init__(self, image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, chunk: int) -> None:
        if not 1 <= chunk <= LARGEST:
            raise ValueError(f"retrieval: chunk={chunk}: must be 1 to {LARGEST}")
        _positives(text_ids, image_ids, "text", "image")
        _positives(image_ids, text_ids, "image", "text")
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        self.image, self.text = _Sorted(image, image_ids, dtype), _Sorted(text, text_ids, dtype)
        # Tall tiles were the fastest of several shapes.
        self.columns, self.rows = max(1, chunk // 2), max(1, 2 * chunk // image.shape[1])
        image_extent, text_extent, width = self.image.extent("image"), self.text.extent("text"), text.shape[1]
        self.slack = _rounding(image_extent.norm, text_extent.norm, width, torch.finfo(dtype))
        screen = Screen(image_extent, text_extent, width)
        usable = dtype == torch.float32 and math.isfinite(screen.off) and image.device.type == "cpu"
        usable &= image_extent.norm * text_extent.norm > SMALL
        self.screen = screen if usable and bfloat16_is_fast(image.device) else None

    def ranks(self) -> Ranks:
        """1 + the number of others that reach the bar, counted in both directions on each tile."""
        bars = self.bars()
        t2i, i2t = (torch.ones_like(bar, dtype=torch.float64) for bar in bars)
        for columns in _slices(len(self.text), self.columns):
            self.count(columns, bars, t2i[columns], i2t)
        return Ranks(t2i=self.text.unsort(t2i.long()), i2t=self.image.unsort(i2t.long()))

    def count(
        self, columns: slice, bars: tuple[Tensor, Tensor], t2i: Float[Tensor, "m"], i2t: Float[Tensor, "N"]
    ) -> None:
        """Adds what these texts and all images find in front of their positives; floats, exact below 2^53."""
        text = self.text[columns]
        for rows, near in self.tiles(columns):
            own = (_inside(near, rows), self.same(near, columns)) if near.start < near.stop else None
            tile = Tile(self.image[rows], text, bars[0][columns], bars[1][rows], own)
            texts, images = (None if self.screen is None else self.screen(tile)) or reached(tile)
            t2i += texts
            i2t[rows] += images

    def tiles(self, columns: slice) -> Iterator[tuple[slice, slice]]:
        """All images in parts, and among which of a part the positives of these texts are: often none."""
        like = self.images_like(columns)
        for rows in _slices(len(self.image), self.rows):
            yield rows, slice(max(like.start, rows.start), min(like.stop, rows.stop))

    def scores(self, rows: slice, texts: Float[Tensor, "E m"]) -> Float[Tensor, "n m"]:
        """Max over Q."""
        image = self.image[rows]
        return best_of(image.flatten(0, 1) @ texts, image.shape[1])

    def images_like(self, columns: slice) -> slice:
        """The images whose ids lie between those of the first and the last text: all positives, and few others."""
        ends = self.text.ids[columns][[0, -1]]
        low = torch.searchsorted(self.image.ids, ends[:1])
        high = torch.searchsorted(self.image.ids, ends[1:], right=True)
        return slice(int(low), int(high))

    def same(self, rows: slice, columns: slice) -> Bool[Tensor, "n m"]:
        return self.image.ids[rows, None] == self.text.ids[columns]

    def bars(self) -> tuple[Float[Tensor, "M"], Float[Tensor, "N"]]:
        """The score that another candidate needs to stand before the best positive: that score less the rounding."""
        lowest = torch.tensor(-torch.inf, dtype=self.text.dtype, device=self.text.ids.device)
        text_best, image_best = lowest.repeat(len(self.text)), lowest.repeat(len(self.image))
        # Narrow tiles: fewer pairs that are no positives.
        for columns in _slices(len(self.text), max(1, self.columns // 4)):
            near, texts = self.images_like(columns), self.text[columns].T
            for rows in _slices(near.stop, self.rows, near.start):
                scores = self.scores(rows, texts).masked_fill_(~self.same(rows, columns), -torch.inf)
                text_best[columns] = torch.maximum(text_best[columns], scores.amax(0))
                image_best[rows] = torch.maximum(image_best[rows], scores.amax(1))
        return text_best - self.slack, image_best - self.slack

    def shortlists(self, k: int) -> tuple[Int[Tensor, "M K"], Int[Tensor, "N L"]]:
        """Indices of the best k images of each text and texts of each image; at a tie a positive comes last."""
        images = _Best(self.text, min(k, len(self.image)))
        texts = _Best(self.image, min(k, len(self.text)))
        for columns in _slices(len(self.text), self.columns):
            texts_here = self.text[columns].T
            for rows, near in self.tiles(columns):
                scores = self.scores(rows, texts_here)
                if near.start < near.stop:
                    scores[_inside(near, rows)] -= self.slack * self.same(near, columns)
                images.add(columns, scores.T, rows.start)
                texts.add(rows, scores, columns.start)
        return self.text.unsort(self.image.order[images.index]), self.image.unsort(self.text.order[texts.index])


class _Best:
    """The best k of each query so far."""

    def __init__(self, queries: _Sorted, k: int) -> None:
        self.k = k
        self.score = torch.full((len(queries), k), -torch.inf, dtype=queries.dtype, device=queries.ids.device)
        self.index = torch.zeros_like(self.score, dtype=torch.int64)

    def add(self, queries: slice, scores: Float[Tensor, "q g"], start: int) -> None:
        """Offer the candidates start, start + 1, … to the queries."""
        new_score, new_index = scores.topk(min(self.k, scores.shape[1]), dim=1)
        all_score = torch.cat([self.score[queries], new_score], dim=1)
        all_index = torch.cat([self.index[queries], new_index + start], dim=1)
        self.score[queries], kept = all_score.topk(self.k, dim=1)
        self.index[queries] = all_index.gather(1, kept)


def _ask(match: Match, asked: Int[Tensor, "P"], texts: int, pairs: int) -> Float[Tensor, "P"]:
    answers = []
    for part in asked.split(pairs):
        answer = match(part // texts, part % texts)
        if answer.shape != part.shape:
            raise ValueError(
                f"match gave scores of shape {tuple(answer.shape)} for {len(part)} pairs; expected one a pair"
            )
        answers.append(answer.detach().to(asked.device).double())
    scores = torch.cat(answers)
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise ValueError(f"rerank: {bad} of {len(scores)} match scores are not finite")
    return scores


def _rank_in_shortlist(
    scores: Float[Tensor, "q k"], positive: Bool[Tensor, "q k"], before: Int[Tensor, "q"]
) -> Int[Tensor, "q"]:
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    after = 1 + ((scores >= best) & ~positive).sum(1)
    # Whatever missed the shortlist stays behind it, also where rounding made its old rank look better.
    return torch.where(positive.any(1), after, before.clamp(min=scores.shape[1] + 1))


def _positives(queries: Tensor, gallery: Tensor, query: str, other: str) -> Int[Tensor, "q"]:
    """How many gallery entries share each query's id."""
    if not len(queries):
        raise ValueError(f"retrieval: there is no {query} to rank")
    ordered, queries = gallery.sort().values, queries.contiguous()
    counts = torch.searchsorted(ordered, queries, right=True) - torch.searchsorted(ordered, queries)
    missing = queries[counts == 0]
    if len(missing):
        first = int(missing[0])
        raise ValueError(
            f"retrieval: {len(missing)} of {len(queries)} {query}s have no {other} with their id (first: {first})"
        )
    return counts


def _chance_one_way(positives: Tensor, gallery: int, ks: Sequence[int]) -> dict[str, float]:
    """P(rank <= r) is 1 - C(n-p, r) / C(n, r) for p positives among n, averaged over the queries."""
    counts, weights = np.unique(positives.cpu().numpy(), return_counts=True)
    drawn = np.arange(gallery)
    found = np.zeros(gallery)
    for count, weight in zip(counts, weights / weights.sum(), strict=True):
        found += weight * (1 - np.cumprod(np.clip((gallery - count - drawn) / (gallery - drawn), 0, None)))
    recall = {f"R@{k}": float(100 * found[min(k, gallery) - 1]) for k in ks}
    mean = float(np.average((gallery + 1) / (counts + 1), weights=weights))
    middle = [int(np.argmax(found >= 0.5 - 1e-9)), int(np.argmax(found > 0.5 + 1e-9))]
    return recall | {"mean_rank": mean, "median_rank": 1 + sum(middle) / 2}


def _rounding(image: float, text: float, width: int, numbers: torch.finfo) -> float:
    """How far equal scores may come out apart: half an eps, times sqrt(E) as errors add up, times the norms."""
    bound = image * text
    if bound > numbers.max / 2:
        raise ValueError(f"retrieval: image . text overflows (norms {image:g} and {text:g}): normalise them")
    return bound * numbers.eps / 2 * max(16.0, math.sqrt(width))


def _slices(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def _inside(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
