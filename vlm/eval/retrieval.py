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

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Match = Callable[[Int[Tensor, "P"], Int[Tensor, "P"]], Float[Tensor, "P"]]
Summary = dict[str, dict[str, float]]


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
    chunk: int = 512,
) -> Ranks:
    """Ranks in both directions from one pass over the scores, max over Q of image . text.

    `chunk` bounds a tile to chunk x chunk scores; it changes speed and memory, not the ranks.
    ValueError: features that are not finite, or a query without any positive.
    """
    pool = _Pool(image, text, image_ids, text_ids, chunk)
    text_bar, image_bar = pool.bars()
    t2i = torch.ones(len(text_ids), dtype=torch.int64, device=text.device)
    i2t = torch.ones(len(image_ids), dtype=torch.int64, device=text.device)
    for rows, columns, scores in pool.tiles():
        block, positive = pool.positives(scores, rows, columns)
        block.masked_fill_(positive, -torch.inf)
        t2i[columns] += (scores >= text_bar[columns]).sum(0)
        i2t[rows] += (scores >= image_bar[rows, None]).sum(1)
    return Ranks(t2i=pool.unsort_texts(t2i), i2t=pool.unsort_images(i2t))


def rerank(
    image: Float[Tensor, "N Q E"],
    text: Float[Tensor, "M E"],
    image_ids: Int[Tensor, "N"],
    text_ids: Int[Tensor, "M"],
    match: Match,
    k: int,
    chunk: int = 512,
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
    before = rank_counts(image, text, image_ids, text_ids, chunk)
    images_of, texts_of = _Pool(image, text, image_ids, text_ids, chunk).shortlists(k)
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
    """{"t2i" | "i2t": {"R@k": percent of queries of rank <= k, "mean_rank", "median_rank"}}."""

    def one(rank: Tensor) -> dict[str, float]:
        values = rank.cpu().numpy()
        recall = {f"R@{k}": float(100 * (values <= k).mean()) for k in ks}
        return recall | {"mean_rank": float(values.mean()), "median_rank": float(np.median(values))}

    return {"t2i": one(ranks.t2i), "i2t": one(ranks.i2t)}


def chance(image_ids: Int[Tensor, "N"], text_ids: Int[Tensor, "M"], ks: Sequence[int] = (1, 5, 10)) -> Summary:
    """What a random ranking is expected to get, in the form of `summarize` (exact, any number of positives)."""
    images_per_text = _positives(text_ids, image_ids, "text", "image")
    texts_per_image = _positives(image_ids, text_ids, "image", "text")
    return {
        "t2i": _chance_one_way(images_per_text, len(image_ids), ks),
        "i2t": _chance_one_way(texts_per_image, len(text_ids), ks),
    }


class _Pool:
    """Both galleries sorted by id, so that the positives of neighbouring queries are one contiguous range."""

    def __init__(self, image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor, chunk: int) -> None:
        if chunk < 1:
            raise ValueError(f"retrieval: chunk={chunk}: must be at least 1")
        assert image.shape[0] == len(image_ids) and text.shape[0] == len(text_ids), "one id per image and per text"
        _positives(text_ids, image_ids, "text", "image")
        _positives(image_ids, text_ids, "image", "text")
        self.image_order, self.text_order = image_ids.argsort(stable=True), text_ids.argsort(stable=True)
        self.image_ids, self.text_ids = image_ids[self.image_order], text_ids[self.text_order]
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        self.image = _sorted(image.detach().to(dtype), self.image_order)
        self.text = _sorted(text.detach().to(dtype), self.text_order)
        self.columns, self.rows = chunk, max(1, chunk // image.shape[1])
        self.slack = self._rounding()

    def _rounding(self) -> float:
        """How far equal scores may come out apart: half an eps, times sqrt(E) as errors add up, times the norms."""
        norms = [_norm(self.image.flatten(0, 1), "image"), _norm(self.text, "text")]
        bound = norms[0] * norms[1]
        if bound > torch.finfo(self.text.dtype).max / 2:
            raise ValueError(f"retrieval: image . text overflows (norms {norms[0]:g} and {norms[1]:g}): normalise them")
        return bound * torch.finfo(self.text.dtype).eps / 2 * max(16.0, math.sqrt(self.text.shape[1]))

    def scores(self, rows: slice, columns: slice) -> Float[Tensor, "n m"]:
        """Max over Q, images as rows: the reduction then runs along contiguous memory."""
        image = self.image[rows]
        flat = image.flatten(0, 1) @ self.text[columns].T
        return flat if image.shape[1] == 1 else flat.unflatten(0, image.shape[:2]).amax(1)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for columns in _slices(0, len(self.text), self.columns):
            for rows in _slices(0, len(self.image), self.rows):
                yield rows, columns, self.scores(rows, columns)

    def images_like(self, columns: slice) -> slice:
        """The images whose ids lie between those of the first and the last text: all positives, and few others."""
        ends = self.text_ids[columns][[0, -1]]
        low = torch.searchsorted(self.image_ids, ends[:1])
        high = torch.searchsorted(self.image_ids, ends[1:], right=True)
        return slice(int(low), int(high))

    def same(self, rows: slice, columns: slice) -> Bool[Tensor, "n m"]:
        return self.image_ids[rows, None] == self.text_ids[columns]

    def bars(self) -> tuple[Float[Tensor, "M"], Float[Tensor, "N"]]:
        """The score that another candidate needs to stand before the best positive: that score less the rounding."""
        text_best = self.text.new_full((len(self.text),), -torch.inf)
        image_best = self.text.new_full((len(self.image),), -torch.inf)
        for columns in _slices(0, len(self.text), self.columns):
            near = self.images_like(columns)
            for rows in _slices(near.start, near.stop, self.rows):
                scores = self.scores(rows, columns).masked_fill_(~self.same(rows, columns), -torch.inf)
                text_best[columns] = torch.maximum(text_best[columns], scores.amax(0))
                image_best[rows] = torch.maximum(image_best[rows], scores.amax(1))
        return text_best - self.slack, image_best - self.slack

    def positives(
        self, scores: Tensor, rows: slice, columns: slice
    ) -> tuple[Float[Tensor, "p m"], Bool[Tensor, "p m"]]:
        """The part of a tile that may hold positives (a view, often empty) and where they are in it."""
        near = self.images_like(columns)
        start = min(max(near.start, rows.start), rows.stop)
        part = slice(start, max(start, min(near.stop, rows.stop)))
        return scores[part.start - rows.start : part.stop - rows.start], self.same(part, columns)

    def shortlists(self, k: int) -> tuple[Int[Tensor, "M K"], Int[Tensor, "N L"]]:
        """Indices of the best k images of each text and texts of each image; at a tie a positive comes last."""
        images = _Best(len(self.text), min(k, len(self.image)), self.text)
        texts = _Best(len(self.image), min(k, len(self.text)), self.text)
        for rows, columns, scores in self.tiles():
            block, positive = self.positives(scores, rows, columns)
            block -= self.slack * positive
            images.add(columns, scores.T, rows.start)
            texts.add(rows, scores, columns.start)
        images_of, texts_of = self.image_order[images.index], self.text_order[texts.index]
        return self.unsort_texts(images_of), self.unsort_images(texts_of)

    def unsort_texts(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, self.text_order, values)

    def unsort_images(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, self.image_order, values)


class _Best:
    """The best k of each query so far."""

    def __init__(self, queries: int, k: int, like: Tensor) -> None:
        self.k = k
        self.score = like.new_full((queries, k), -torch.inf)
        self.index = torch.zeros((queries, k), dtype=torch.int64, device=like.device)

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


def _sorted(features: Tensor, order: Tensor) -> Tensor:
    """Features in the order of their ids; no copy where they already are."""
    ready = bool((order[1:] > order[:-1]).all())
    return features if ready else features[order]


def _norm(vectors: Float[Tensor, "n E"], name: str) -> float:
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    bad = int((~norms.isfinite()).sum())
    if bad:
        raise ValueError(f"retrieval: {bad} of {len(norms)} {name} vectors are not finite (NaN, infinite or too large)")
    return float(norms.max())


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
