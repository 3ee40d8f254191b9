"""The best of all pictures for some queries: exact, one pass over the vectors, bounded memory.

Letters: S queries, V vectors of each, R pictures, Q vectors of each, E their width, K best.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm.search.store import between

GROUP = 8  # pieces whose scores are looked at together


@dataclass(frozen=True)
class Term:
    """One side of queries, words or a picture: S V E, and its share of the score."""

    vectors: Float[Tensor, "S V E"]
    weight: float = 1.0


@dataclass(frozen=True)
class Best:
    """The best places of each query, best first; -inf and -1 where there are fewer."""

    scores: Float[Tensor, "S K"]
    places: Int[Tensor, "S K"]


def score(terms: Sequence[Term], rows: Float[Tensor, "R Q E"]) -> Float[Tensor, "S R"]:
    """Each vector of a query takes the vector of the picture that answers it best; their mean, summed by weight.

    With one vector each this is the cosine, with one of words BLIP-2's similarity. Rows are in fp32.
    """
    flat = rows.flatten(0, 1)
    total = None
    for term in terms:
        queries, vectors, _ = term.vectors.shape
        asked = term.vectors.flatten(0, 1)
        products = (flat @ asked[0])[None] if len(asked) == 1 else asked @ flat.T  # the first is faster for one
        near = products if rows.shape[1] == 1 else products.view(len(asked), *rows.shape[:2]).amax(2)
        dots = near if vectors == 1 else near.view(queries, vectors, -1).mean(1)
        dots = dots if term.weight == 1 else dots * term.weight
        total = dots if total is None else total + dots
    assert total is not None
    return total


def search(terms: Sequence[Term], pieces: Iterator[Tensor], k: int, unused: Int[Tensor, "U"], first: int = 0) -> Best:
    """The best `k` of all rows that come, in pieces of R Q E, numbered from `first` on, `unused` places left out.

    Memory: what one piece takes in fp32, the scores of GROUP, and the best so far. Which of equal scores are among the
    best `k` is open.
    """
    queries, wide = len(terms[0].vectors), torch.empty(0)
    best = Best(torch.full((queries, 0), -torch.inf), torch.zeros(queries, 0, dtype=torch.long))
    held = list[Tensor]()
    for piece in pieces:
        if len(piece) > len(wide):
            wide = torch.empty(piece.shape)
        held.append(score(terms, wide[: len(piece)].copy_(piece)))
        if len(held) == GROUP:
            best, first = _with(best, torch.cat(held, 1), k, unused, first)
            held.clear()
    return _with(best, torch.cat(held, 1), k, unused, first)[0] if held else best


def _with(best: Best, scores: Tensor, k: int, unused: Tensor, first: int) -> tuple[Best, int]:
    """The best so far and of the places from `first` on, and the place behind these."""
    last = first + scores.shape[1]
    if len(unused):
        scores[:, between(unused, first, last)] = -torch.inf
    if best.scores.shape[1] < k or bool((scores.amax(1) > best.scores[:, -1]).any()):
        best = merge(best, Best(scores, torch.arange(first, last).expand(len(scores), -1)), k)
    return best, last


def merge(left: Best, right: Best, k: int) -> Best:
    """The best `k` of two lists."""
    scores = torch.cat([left.scores, right.scores], 1)
    places = torch.cat([left.places, right.places], 1)
    if scores.shape[1] > 4 * k:  # sorting all of them would take longer than the scores
        scores, chosen = scores.topk(k, 1)
        places = places.gather(1, chosen)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Best(scores[:, :k], places.gather(1, order[:, :k]))
