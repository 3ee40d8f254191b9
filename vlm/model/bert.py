"""BERT as a text encoder over the common stack (Devlin et al. 2019, arXiv 1810.04805); MiniLM is a smaller one.

Letters: M texts, T text tokens, D width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.nn.attention import Attention
from vlm.nn.block import Block, PostNorm, Stack
from vlm.nn.ffn import Mlp
from vlm.nn.tokens import Tokens, count_positions


class Bert(nn.Module):
    """Words, places and segments added up and normed, then a bidirectional stack with the norms after the branches."""

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        layers: int,
        heads: int,
        max_tokens: int = 512,
        hidden: int | None = None,
        segments: int = 2,
        pooler: bool = True,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        """`max_tokens`: longest text it can read; `hidden`: width inside the FFN, 4 dim unless given.

        `segments`: kinds of text that a row may hold (question and passage). `pooler`: a layer on the first token.
        """
        super().__init__()

        def residual() -> PostNorm:
            return PostNorm(nn.LayerNorm(dim, eps=eps), dropout)

        width = 4 * dim if hidden is None else hidden
        blocks = [
            Block(Attention(dim, heads, bias=True), Mlp(dim, width), residual(), residual()) for _ in range(layers)
        ]
        self.dim, self.max_tokens = dim, max_tokens
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(max_tokens, dim)
        self.segment = nn.Embedding(segments, dim)
        self.embed_norm, self.embed_dropout = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)
        self.stack = Stack(blocks)
        self.pooler = nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) if pooler else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal with deviation 0.02, no bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def read(
        self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"], segment: Int[Tensor, "M T"] | None = None
    ) -> Float[Tensor, "M T D"]:
        """States of all tokens; `segment` is 0 everywhere unless given. ValueError: a text that is too long."""
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"a text of {ids.shape[1]} tokens is longer than BERT's {self.max_tokens}")
        kind = self.segment.weight[0] if segment is None else self.segment(segment)
        x = self.embedding(ids) + kind + self.position(count_positions(valid))
        x = self.embed_dropout(self.embed_norm(x))
        hidden: Tensor = self.stack(Tokens.of(x, causal=False, valid=valid)).hidden
        return hidden

    def forward(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M D"]:
        """Feature of each text: the state at its first valid token ([CLS]), through the pooler if there is one."""
        first = valid.long().argmax(1)
        out: Tensor = self.pooler(self.read(ids, valid)[torch.arange(len(ids), device=ids.device), first])
        return out
