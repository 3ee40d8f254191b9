"""T5's relative positions: one learned number per head and class of distance, added to the scores of all blocks.

Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1. Letters: B batch, S new tokens, P remembered tokens,
T looked at (past and new), H heads.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vlm.nn.tokens import Tokens, Visibility, count_positions

Bucket = Callable[[Tensor, int, int], Tensor]  # distances (key minus query), buckets, longest: the bucket of each


def both_ways(distance: Int[Tensor, "*S"], buckets: int, longest: int) -> Int[Tensor, "*S"]:
    """An encoder's buckets: the first half for what stands before the query and for itself, the second for the rest."""
    half = buckets // 2
    return _coarser(distance.abs(), half, longest) + half * (distance > 0)


def backwards(distance: Int[Tensor, "*S"], buckets: int, longest: int) -> Int[Tensor, "*S"]:
    """A decoder's buckets: all of them for what stands before the query."""
    return _coarser((-distance).clamp_min(0), buckets, longest)


def _coarser(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """A bucket for each of the shorter distances, logarithmically wider ones up to `longest`, the last for the rest."""
    exact = buckets // 2
    # In fp32 and in this order, as published: a distance at the edge of two buckets must not change sides.
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(longest / exact)
    wide = exact + (ratio * (buckets - exact)).long()
    return torch.where(distance < exact, distance, wide.clamp_max(buckets - 1))


class RelativeBias(nn.Module):
    """From places to what is added to the scores of attention, hidden keys included (at minus infinity)."""

    def __init__(self, heads: int, bucket: Bucket, buckets: int = 32, longest: int = 128) -> None:
        """`bucket`: `both_ways` or `backwards`; `longest`: from this distance on all are alike.

        ValueError: so few buckets that none is left for long distances.
        """
        super().__init__()
        if buckets < 4 or longest <= buckets:
            raise ValueError(f"buckets={buckets}, longest={longest}: at least 4 buckets, and longest above them")
        self.bucket, self.buckets, self.longest = bucket, buckets, longest
        self.table = nn.Embedding(buckets, heads)

    def forward(self, tokens: Tokens, past: Bool[Tensor, "B P"] | None = None, past_full: bool = False) -> Visibility:
        """As `Tokens.visibility`, with a float mask (B or 1, H S T). Distances count valid tokens alone."""
        length = tokens.x.shape[1]
        seen, is_causal = tokens.visibility(past, past_full)
        place = _places(tokens, past, past_full)
        distance = place[:, None, :] - place[:, -length:, None]
        bias = self.table(self.bucket(distance, self.buckets, self.longest)).permute(0, 3, 1, 2).contiguous()
        if is_causal:
            seen = (distance <= 0)[:, None]
        return Visibility(bias if seen is None else bias.masked_fill(~seen, -torch.inf), False)


def _places(tokens: Tokens, past: Tensor | None, past_full: bool) -> Int[Tensor, "B T"]:
    """Of past and new tokens; of one row for all where nothing is padding."""
    if tokens.full and (past is None or past_full):
        total = tokens.x.shape[1] + (0 if past is None else past.shape[1])
        return torch.arange(total, device=tokens.x.device)[None]
    return count_positions(tokens.valid if past is None else torch.cat([past, tokens.valid], 1))
