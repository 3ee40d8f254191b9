"""Tokens: the currency between all parts, and the one place that says who sees whom.

Letters: B batch, S sequence, P cached positions, T all keys (P + S), D model width.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IMAGE_ID = -1  # stands in a row of token ids for one image token
IGNORE = -100  # label of a token that is not supervised


class Route(IntEnum):
    """Whose weights a token uses where a module is `PerRoute`."""

    TEXT = 0
    IMAGE = 1
    QUERY = 2
    FUSED = 3


class Run(NamedTuple):
    """Neighbouring columns that are alike in every row of the batch."""

    length: int
    route: int
    causal: bool
    full: bool


class Visibility(NamedTuple):
    """Which keys each query may look at, in the form scaled_dot_product_attention takes fastest.

    A mask of floats is added to the scores: T5's `RelativeBias`.
    """

    mask: Bool[Tensor, "B 1 S T"] | Float[Tensor, "B H S T"] | None
    is_causal: bool


@dataclass(frozen=True)
class Tokens:
    """Embeddings with everything that attention and routing need to know about them.

    `runs` describes the same layout statically (None: rows differ). It is only a hint that lets modules slice
    instead of mask: dropping it (`dynamic`) never changes a result.
    """

    x: Float[Tensor, "B S D"]
    route: Int[Tensor, "B S"]
    valid: Bool[Tensor, "B S"]  # False on padding
    causal: Bool[Tensor, "B S"]  # True: earlier tokens may not look at this one
    position: Int[Tensor, "B S"]
    runs: tuple[Run, ...] | None = None

    @staticmethod
    def of(
        x: Float[Tensor, "B S D"],
        route: Route = Route.TEXT,
        causal: bool = True,
        valid: Bool[Tensor, "B S"] | None = None,
        position: Int[Tensor, "B S"] | None = None,
    ) -> "Tokens":
        """Tokens of one kind; positions count the valid tokens of a row from 0 unless they are given."""
        batch, length, _ = x.shape
        full = valid is None
        if valid is None:
            valid = x.new_ones(batch, length, dtype=torch.bool)
        if position is None:
            position = count_positions(valid)
        return Tokens(
            x=x,
            route=torch.full((batch, length), int(route), device=x.device),
            valid=valid,
            causal=torch.full((batch, length), causal, device=x.device),
            position=position,
            runs=(Run(length, int(route), causal, full),),
        )

    def concat(self, other: "Tokens") -> "Tokens":
        """These tokens followed by others; positions are kept as they are."""
        both = None if self.runs is None or other.runs is None else self.runs + other.runs
        return Tokens(
            x=torch.cat([self.x, other.x], 1),
            route=torch.cat([self.route, other.route], 1),
            valid=torch.cat([self.valid, other.valid], 1),
            causal=torch.cat([self.causal, other.causal], 1),
            position=torch.cat([self.position, other.position], 1),
            runs=both,
        )

    def dynamic(self) -> "Tokens":
        """The same tokens without the static hint."""
        return replace(self, runs=None)

    def pieces(self) -> list[tuple[int, int]] | None:
        """(route, length) of the maximal pieces with one route, left to right; None when rows differ."""
        if self.runs is None:
            return None
        merged: list[tuple[int, int]] = []
        for run in self.runs:
            if merged and merged[-1][0] == run.route:
                merged[-1] = (run.route, merged[-1][1] + run.length)
            elif run.length:
                merged.append((run.route, run.length))
        return merged

    @property
    def full(self) -> bool:
        """Known statically that no token is padding."""
        return self.runs is not None and all(run.full for run in self.runs)

    def visibility(self, past: Bool[Tensor, "B P"] | None = None, past_full: bool = False) -> Visibility:
        """Who may look at whom; `past` marks the valid cached tokens, which all new tokens may see.

        `past_full`: known that all of them are valid.
        """
        if self.full and self.runs is not None:
            free = not any(run.causal for run in self.runs) or self.x.shape[1] == 1
            if free and (past is None or past_full):
                return Visibility(None, False)
            if past is None and all(run.causal for run in self.runs):
                return Visibility(None, True)
        return Visibility(self.mask(past), False)

    def mask(self, past: Bool[Tensor, "B P"] | None = None) -> Bool[Tensor, "B 1 S T"]:
        """True where a query (row) may look at a key (column): causal, prefix-LM and bidirectional in one rule."""
        length = self.x.shape[1]
        order = torch.arange(length, device=self.x.device)
        earlier = order[None, :] <= order[:, None]
        seen = self.valid[:, None, :] & (earlier | ~self.causal[:, None, :])
        # A token sees at least itself: a row of padding with nothing to attend to would be 0 / 0.
        seen = seen | torch.eye(length, dtype=torch.bool, device=self.x.device)
        if past is not None:
            seen = torch.cat([past[:, None, :].expand(-1, length, -1), seen], 2)
        return seen[:, None]


def count_positions(valid: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Positions that count valid tokens from 0, so that padding on either side shifts nothing."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)
