"""Language backbones: a causal decoder over the common stack, and the published ones as settings of it.

Letters: B batch, S sequence, T text tokens, D width, V vocabulary, K chosen positions.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.nn.attention import Attention, head_width
from vlm.nn.block import Block, Output, PreNorm, Stack
from vlm.nn.ffn import GatedMlp, Mlp
from vlm.nn.moe import Balance, MixtureOfExperts, softmax_router
from vlm.nn.norm import RMSNorm
from vlm.nn.retention import Decay
from vlm.nn.rotary import Rotary, Scaling
from vlm.nn.state import State
from vlm.nn.tokens import Tokens


@runtime_checkable
class Language(Protocol):
    """What a language model offers to the rest; a module of the user's own fits without registering anything."""

    dim: int
    vocabulary: int

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids."""
        ...

    def __call__(self, tokens: Tokens, state: State | None = None) -> Output:
        """Hidden states of tokens that follow those in `state`."""
        ...

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits of hidden states."""
        ...


class LearnedPositions(nn.Module):
    """A learned vector for every position, added to the embeddings (GPT, OPT)."""

    def __init__(self, max_positions: int, dim: int, offset: int = 0) -> None:
        """`offset`: rows of the table before that of position 0, which nothing reads (OPT: 2)."""
        super().__init__()
        self.max_positions, self.offset = max_positions, offset
        self.embedding = nn.Embedding(max_positions + offset, dim)

    def forward(self, position: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Errors: positions beyond the table; on a GPU looked for only in calls that are longer than it is."""
        looked = position.device.type == "cpu" or position.shape[1] > self.max_positions  # a GPU would have to wait
        if looked and position.numel() and not torch.compiler.is_compiling():
            last = int(position.max())
            if last >= self.max_positions:
                raise ValueError(
                    f"position {last} is beyond the {self.max_positions} learned ones (max_positions): "
                    "shorten the text, lower max_new, or build the model with more of them"
                )
        out: Tensor = self.embedding(position + self.offset)
        return out


class Decoder(nn.Module):
    """Embedding, stack and vocabulary head, tied or not."""

    def __init__(
        self, vocabulary: int, stack: Stack, dim: int, tied: bool = True, positions: nn.Module | None = None
    ) -> None:
        """`stack`: blocks with their final norm; `tied`: the head is the transposed embedding.

        `positions`: from positions (B S) to what is added to the embeddings; rotary ones belong to the stack.
        """
        super().__init__()
        self.dim, self.vocabulary = dim, vocabulary
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = positions
        self.stack = stack
        self.head: nn.Module | None = None if tied else nn.Linear(dim, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Llama's initialisation: normal with deviation 0.02, no bias; then what other modules ask for themselves."""
        plain = nn.Linear | nn.Embedding
        for module in self.modules():
            if isinstance(module, plain):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Inner ones first, so that a module has the last word on its parts.
        for module in reversed(list(self.modules())[1:]):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and not isinstance(module, plain):
                reset()

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids; a negative id (an image's placeholder) gives any row, to be overwritten."""
        out: Tensor = self.embedding(ids.clamp_min(0))
        return out

    def forward(self, tokens: Tokens, state: State | None = None) -> Output:
        """Hidden states after the final norm."""
        if self.positions is not None:
            tokens = replace(tokens, x=tokens.x + self.positions(tokens.position))
        out: Output = self.stack(tokens, None, state)
        return out

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits."""
        if self.head is None:
            return nn.functional.linear(hidden, self.embedding.weight)
        out: Tensor = self.head(hidden)
        return out


def decoder(
    vocabulary: int,
    dim: int,
    layers: int,
    mixer: Callable[[int], nn.Module],
    ffn: Callable[[int], nn.Module],
    norm: Callable[[], nn.Module],
    *,
    rotary: Rotary | None = None,
    decay: Decay | None = None,
    positions: nn.Module | None = None,
    tied: bool = True,
    dropout: float = 0.0,
    residual: type[PreNorm] = PreNorm,
    final_norm: bool = True,
) -> Decoder:
    """Any decoder over the common stack; `mixer` and `ffn` make block i's, so that blocks may differ.

    `rotary`, `decay`, `positions`: what the mixers know of places. Stacks with `residual=PostNorm` have no final norm.
    """
    blocks = [Block(mixer(i), ffn(i), residual(norm(), dropout), residual(norm(), dropout)) for i in range(layers)]
    stack = Stack(blocks, norm() if final_norm else None, rotary, decay)
    return Decoder(vocabulary, stack, dim, tied, positions)


def llama(
    vocabulary: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    hidden: int | None = None,
    theta: float = 10_000.0,
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
    *,
    scaling: Scaling | None = None,
    bias: bool = False,
    head_dim: int | None = None,
    head_norm: bool = False,
    window: int | Sequence[int | None] | None = None,
    unrotated: Collection[int] = (),
    ffn: Callable[[int], nn.Module] | None = None,
) -> Decoder:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped key/value heads, SwiGLU (arXiv 2302.13971).

    `hidden`: width inside the FFN; unless given, 8/3 dim rounded up to a multiple of 32, as Llama does.
    Llama 3.1: `scaling`. Qwen2: `bias` (of query, key, value), eps 1e-6. Qwen3: `head_norm`, `head_dim`, eps 1e-6.
    Mistral: `window`, or one for each block where they differ (Qwen2). SmolLM3: blocks that are `unrotated`.
    `ffn`: block i's, in place of SwiGLU.
    """
    windows = window if isinstance(window, Sequence) else [window] * layers
    width = -(-8 * dim // (3 * 32)) * 32 if hidden is None else hidden

    def norm(size: int = dim) -> nn.Module:
        return RMSNorm(size, eps=eps)

    def mixer(block: int) -> Attention:
        return Attention(
            dim,
            heads,
            kv_heads,
            bias,
            out_bias=False,
            head_dim=head_dim,
            norm=norm if head_norm else None,
            window=windows[block],
            rotated=block not in unrotated,
        )

    def gated(_: int) -> nn.Module:
        return GatedMlp(dim, width)

    rotary = Rotary(head_width(dim, heads) if head_dim is None else head_dim, theta, scaling)
    return decoder(
        vocabulary, dim, layers, mixer, gated if ffn is None else ffn, norm, rotary=rotary, tied=tied, dropout=dropout
    )


def mixtral(
    vocabulary: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    experts: int = 8,
    top_k: int = 2,
    theta: float = 1e6,
    eps: float = 1e-5,
    tied: bool = False,
    dropout: float = 0.0,
    *,
    window: int | None = None,
    balance: Sequence[Balance] = (),
) -> Decoder:
    """Llama with a mixture of experts in every block (arXiv 2401.04088); `hidden`: width inside one expert."""

    def ffn(_: int) -> MixtureOfExperts:
        return MixtureOfExperts(dim, hidden, softmax_router(dim, experts, top_k), balance=balance)

    return llama(vocabulary, dim, layers, heads, kv_heads, None, theta, eps, tied, dropout, window=window, ffn=ffn)


def opt(
    vocabulary: int,
    dim: int,
    layers: int,
    heads: int,
    hidden: int | None = None,
    max_positions: int = 2048,
    eps: float = 1e-5,
    tied: bool = True,
    dropout: float = 0.0,
) -> Decoder:
    """OPT (arXiv 2205.01068) with the norms before the branches: all sizes but 350M.

    `hidden`: width inside the FFN, 4 dim unless given.
    """
    width = 4 * dim if hidden is None else hidden
    return decoder(
        vocabulary,
        dim,
        layers,
        mixer=lambda _: Attention(dim, heads, bias=True),
        ffn=lambda _: Mlp(dim, width, nn.ReLU()),
        norm=lambda: nn.LayerNorm(dim, eps=eps),
        positions=LearnedPositions(max_positions, dim, offset=2),
        tied=tied,
        dropout=dropout,
    )


def splice(
    embedded: Float[Tensor, "B S D"], ids: Int[Tensor, "B S"], image: Float[Tensor, "K Q D"], image_id: int
) -> Float[Tensor, "B S D"]:
    """Puts the tokens of K images where the rows' ids hold the placeholder: images in the order of the rows.

    A row may show none, one or several. ValueError: a row that holds a part of one, or other than K in all.
    """
    slots = ids == image_id
    found: list[int] = slots.sum(1).tolist()
    count, size = image.shape[:2]
    if sum(found) != count * size or any(holes % size for holes in found):
        raise ValueError(
            f"image placeholders in the rows of the text: {found}, for {count} images of {size} tokens each"
        )
    return embedded.masked_scatter(slots[..., None], image.to(embedded.dtype))
