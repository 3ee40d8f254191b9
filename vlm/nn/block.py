"""Block and Stack: the one Transformer body behind text encoders, Q-Formers and language models.

A block is a mixer (attention, retention or anything with their signature), an optional cross-attention and a
feed-forward network, each inside a residual that says where the norm stands. Systems differ in what fills these slots.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.nn.attention import CrossAttention, ImageKeyValue
from vlm.nn.context import Context
from vlm.nn.moe import Routing, feed
from vlm.nn.relative import RelativeBias
from vlm.nn.retain import precise
from vlm.nn.retention import Decay, Retention
from vlm.nn.rotary import Rotary
from vlm.nn.route import call, only
from vlm.nn.state import LayerState, State
from vlm.nn.tokens import Route, Tokens

Norm = Callable[[], nn.Module]


class PreNorm(nn.Module):
    """x + f(norm(x)): GPT, Llama, ViT."""

    def __init__(self, norm: nn.Module, dropout: float = 0.0) -> None:
        """`norm` may be `PerRoute`; `dropout` acts on the branch."""
        super().__init__()
        self.norm, self.dropout = norm, nn.Dropout(dropout) if dropout else nn.Identity()

    def enter(self, x: Tensor, tokens: Tokens) -> Tensor:
        """What the branch receives."""
        return call(self.norm, x, tokens)

    def leave(self, x: Tensor, branch: Tensor, tokens: Tokens) -> Tensor:
        """The stream after the branch."""
        out: Tensor = x + self.dropout(branch)
        return out


class PostNorm(PreNorm):
    """norm(x + f(x)): BERT, the Q-Former."""

    def enter(self, x: Tensor, tokens: Tokens) -> Tensor:
        """What the branch receives."""
        return x

    def leave(self, x: Tensor, branch: Tensor, tokens: Tokens) -> Tensor:
        """The stream after the branch."""
        return call(self.norm, x + self.dropout(branch), tokens)


class BranchNorm(PostNorm):
    """x + norm(f(x)): EVA-02-E, CogVLM's vision tower."""

    def leave(self, x: Tensor, branch: Tensor, tokens: Tokens) -> Tensor:
        """The stream after the branch."""
        return x + call(self.norm, self.dropout(branch), tokens)


class Cross(nn.Module):
    """Cross-attention inside its residual, for the tokens of one route; the others pass untouched."""

    def __init__(self, attention: CrossAttention, residual: PreNorm, route: Route) -> None:
        """`route`: the tokens that look at the image (Q-Former: the queries)."""
        super().__init__()
        self.attention, self.residual, self.route = attention, residual, route

    def forward(self, x: Float[Tensor, "B S D"], tokens: Tokens, image: ImageKeyValue) -> Float[Tensor, "B S D"]:
        """`image` comes from `self.attention.project`."""

        def attend(part: Tensor) -> Tensor:
            branch = self.attention(self.residual.enter(part, tokens), image)
            return self.residual.leave(part, branch, tokens)

        return only(self.route, attend, x, tokens)


class Block(nn.Module):
    """Mixer, optional cross-attention, feed-forward network."""

    def __init__(
        self,
        mixer: nn.Module,
        ffn: nn.Module,
        mixer_residual: PreNorm,
        ffn_residual: PreNorm,
        cross: Cross | None = None,
    ) -> None:
        """`ffn` may be `PerRoute`; the residuals hold the norms."""
        super().__init__()
        self.mixer, self.mixer_residual = mixer, mixer_residual
        self.cross: Cross | None = cross
        self.ffn, self.ffn_residual = ffn, ffn_residual

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, image: ImageKeyValue | None, past: LayerState | None
    ) -> tuple[Float[Tensor, "B S D"], LayerState, list[Routing]]:
        """The tokens after this block, the mixer's memory of them, and what its mixtures of experts did."""
        tokens = context.tokens
        branch, present = self.mixer(self.mixer_residual.enter(x, tokens), context, past)
        x = self.mixer_residual.leave(x, branch, tokens)
        if self.cross is not None and image is not None:
            x = self.cross(x, tokens, image)
        branch, routings = feed(self.ffn, self.ffn_residual.enter(x, tokens), tokens)
        return self.ffn_residual.leave(x, branch, tokens), present, routings


class ImageMemory(NamedTuple):
    """An image, or a text that was read, as the cross-attentions of a stack see it; None for blocks without one."""

    blocks: tuple[ImageKeyValue | None, ...]

    def select(self, index: Int[Tensor, "R"]) -> "ImageMemory":
        """Rows picked by index, with repeats: one image against many texts."""
        return ImageMemory(tuple(None if block is None else block.select(index) for block in self.blocks))


class Output(NamedTuple):
    """Hidden states of the given tokens, the memory after them, and what each mixture of experts did."""

    hidden: Float[Tensor, "B S D"]
    state: State
    routings: tuple[Routing, ...] = ()


class Stack(nn.Module):
    """Blocks in a row, with an optional final norm and what the mixers need to know about places."""

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: nn.Module | None = None,
        rotary: Rotary | None = None,
        decay: Decay | None = None,
        relative: RelativeBias | None = None,
    ) -> None:
        """`norm`: after the last block (pre-norm stacks); `rotary`, `relative`: for attention.

        `decay`: for retention.
        """
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.rotary, self.decay, self.relative = rotary, decay, relative
        self.recompute = False  # activation checkpointing: blocks run again in the backward pass
        self.masked = not all(isinstance(block.mixer, Retention) for block in blocks)

    def look(self, image: Float[Tensor, "B N C"], valid: Bool[Tensor, "B N"] | None = None) -> ImageMemory:
        """Keys and values of an image for every cross-attention, to be made once and used by many passes.

        `valid`: which of its tokens are not padding; None: all of them.
        """
        crosses = [block.cross for block in self.blocks if isinstance(block, Block)]
        seen = [None if cross is None else cross.attention.project(image, valid) for cross in crosses]
        return ImageMemory(tuple(seen))

    def forward(self, tokens: Tokens, image: ImageMemory | None = None, state: State | None = None) -> Output:
        """Runs tokens after those that `state` remembers. Errors: a state of another model."""
        if state is not None and len(state.layers) != len(self.blocks):
            raise ValueError(f"this state is of another model: {len(state.layers)} layers for {len(self.blocks)}")
        context = self._context(tokens, state)
        x, layers, routings = tokens.x, [], []
        for i, block in enumerate(self.blocks):
            memory = None if image is None else image.blocks[i]
            given = (x, context, memory, None if state is None else state.layers[i])
            kept = not self.recompute or not torch.is_grad_enabled()
            x, present, done = block(*given) if kept else checkpoint(block, *given, use_reentrant=False)
            layers.append(present)
            routings += done
        return Output(call(self.norm, x, tokens), self._after(tuple(layers), tokens, state), tuple(routings))

    def _context(self, tokens: Tokens, state: State | None) -> Context:
        """What all blocks share; without attention nothing here is quadratic in the length."""
        past, full, seen = (None, False, None) if state is None else (state.valid, state.full, state.seen)
        see = tokens.visibility if self.relative is None else partial(self.relative, tokens)
        return Context(
            tokens,
            see(past, full) if self.masked else None,
            None if self.rotary is None else self.rotary(tokens.position, precise(tokens.x.dtype)),
            None if self.decay is None else self.decay(tokens, seen),
        )

    def _after(self, layers: tuple[LayerState, ...], tokens: Tokens, before: State | None) -> State:
        valid = seen = None
        if self.masked:
            valid = (
                tokens.valid if before is None or before.valid is None else torch.cat([before.valid, tokens.valid], 1)
            )
        # Row by row, because padding on the right must not move the next token away.
        position = torch.where(tokens.valid, tokens.position + 1, 0).amax(1)
        if self.decay is not None:
            seen = tokens.valid.sum(1).to(precise(tokens.x.dtype))
        if before is not None:
            position = torch.maximum(position, before.position)
            seen = seen if seen is None or before.seen is None else before.seen + seen
        full = tokens.full and (before is None or before.full)
        return State(layers, valid, position, full, seen)
