"""Text encoders; CLIP's text tower over the common stack (Radford et al. 2021, arXiv 2103.00020).

Letters: M texts, T text tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from vlm.nn.attention import Attention
from vlm.nn.block import Block, PreNorm, Stack
from vlm.nn.ffn import Mlp
from vlm.nn.tokens import Tokens


@runtime_checkable
class TextTower(Protocol):
    """What is asked of a text encoder; a module of the user's own fits without registering anything."""

    dim: int

    def __call__(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M D"]:
        """Feature of each text."""
        ...


class TextEncoder(nn.Module):
    """Token and position embeddings, a causal pre-norm stack, and the state at the last token as the text's feature."""

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        layers: int,
        heads: int,
        max_tokens: int,
        activation: Callable[[], nn.Module] = nn.GELU,
        hidden: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        """`max_tokens`: longest text it can read; `hidden`: width inside the FFN, 4 dim unless given; `eps`: norms'."""
        super().__init__()
        self.dim, self.max_tokens = dim, max_tokens
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.empty(max_tokens, dim))
        blocks = [
            Block(
                Attention(dim, heads, bias=True),
                Mlp(dim, 4 * dim if hidden is None else hidden, activation()),
                PreNorm(nn.LayerNorm(dim, eps=eps), dropout),
                PreNorm(nn.LayerNorm(dim, eps=eps), dropout),
            )
            for _ in range(layers)
        ]
        self.stack = Stack(blocks, norm=nn.LayerNorm(dim, eps=eps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation of the embeddings; the linear layers keep torch's."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M D"]:
        """Feature of each text: the state at its last valid token (the end-of-text token)."""
        # Nothing later is seen (causal) and the padding is on the right, so no mask is needed for it.
        hidden: Tensor = self.stack(Tokens.of(self.embed(ids), causal=True)).hidden
        return hidden[torch.arange(len(ids), device=ids.device), valid.sum(1) - 1]

    def embed(self, ids: Int[Tensor, "M T"]) -> Float[Tensor, "M T D"]:
        """Tokens at their places. Errors: a text that is too long."""
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"a text of {ids.shape[1]} tokens is longer than the text encoder's {self.max_tokens}")
        out: Tensor = self.embedding(ids) + self.position[: ids.shape[1]]
        return out


class PaddedTextEncoder(TextEncoder):
    """SigLIP's: every text is filled up to the same length, all tokens see all, and the last one is the feature.

    Source: Zhai et al. 2023, arXiv 2303.15343. Padding takes part like any word, as it did in training.
    """

    def __init__(self, *args: Any, pad: int, **options: Any) -> None:
        """`pad`: the id that fills; the rest as of `TextEncoder`."""
        super().__init__(*args, **options)
        self.pad = pad

    def forward(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M D"]:
        """Feature of each text, whatever the batch was padded with or to."""
        filled = pad(ids.masked_fill(~valid, self.pad), (0, max(0, self.max_tokens - ids.shape[1])), value=self.pad)
        hidden: Tensor = self.stack(Tokens.of(self.embed(filled), causal=False)).hidden
        return hidden[:, -1]
