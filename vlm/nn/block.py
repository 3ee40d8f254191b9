"""Block and Stack: the one Transformer body behind text encoders, Q-Formers and language models.

A block is a mixer (attention or anything with its signature), an optional cross-attention and a feed-forward network,
each inside a residual that says where the norm stands. Systems differ in what fills these slots.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.nn.attention import Context, CrossAttention, ImageKeyValue
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
        self.norm, self.dropout = norm, nn.Dropout(dropout)

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
    ) -> tuple[Float[Tensor, "B S D"], LayerState]:
        """The tokens after this block, and the mixer's memory of them."""
        tokens = context.tokens
        branch, present = self.mixer(self.mixer_residual.enter(x, tokens), context, past)
        x = self.mixer_residual.leave(x, branch, tokens)
        if self.cross is not None and image is not None:
            x = self.cross(x, tokens, image)
        branch = call(self.ffn, self.ffn_residual.enter(x, tokens), tokens)
        return self.ffn_residual.leave(x, branch, tokens), present


class ImageMemory(NamedTuple):
    """An image as the cross-attentions of a stack see it; None for blocks without one."""

    blocks: tuple[ImageKeyValue | None, ...]

    def select(self, index: Int[Tensor, "R"]) -> "ImageMemory":
        """Rows picked by index, with repeats: one image against many texts."""
        return ImageMemory(tuple(None if block is None else block.select(index) for block in self.blocks))


class Output(NamedTuple):
    """Hidden states of the given tokens, and the memory after them."""

    hidden: Float[Tensor, "B S D"]
    state: State


class Stack(nn.Module):
    """Blocks in a row, with an optional final norm and rotary positions."""

    def __init__(self, blocks: Sequence[Block], norm: nn.Module | None = None, rotary: Rotary | None = None) -> None:
        """`norm`: after the last block (pre-norm stacks)."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.rotary = rotary

    def look(self, image: Float[Tensor, "B N C"]) -> ImageMemory:
        """Keys and values of an image for every cross-attention, to be made once and used by many passes."""
        crosses = [block.cross for block in self.blocks if isinstance(block, Block)]
        return ImageMemory(tuple(None if cross is None else cross.attention.project(image) for cross in crosses))

    def forward(self, tokens: Tokens, image: ImageMemory | None = None, state: State | None = None) -> Output:
        """Runs tokens after those that `state` remembers."""
        angles = None if self.rotary is None else self.rotary(tokens.position)
        visibility = tokens.visibility(None if state is None else state.valid)
        context = Context(tokens, visibility, angles)
        x, layers = tokens.x, []
        for i, block in enumerate(self.blocks):
            memory = None if image is None else image.blocks[i]
            x, present = block(x, context, memory, None if state is None else state.layers[i])
            layers.append(present)
        valid = tokens.valid if state is None else torch.cat([state.valid, tokens.valid], 1)
        # Row by row, because padding on the right must not move the next token away.
        following = torch.where(tokens.valid, tokens.position + 1, 0).amax(1)
        if state is not None:
            following = torch.maximum(following, state.position)
        return Output(call(self.norm, x, tokens), State(tuple(layers), valid, following))
