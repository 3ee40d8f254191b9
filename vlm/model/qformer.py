"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597) over the common stack.

Letters: B images, N image tokens, C image width, Q queries, M texts, T text tokens, D width, V vocabulary.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from vlm.nn.attention import Attention, CrossAttention
from vlm.nn.block import Block, Cross, ImageMemory, Output, PostNorm, Stack
from vlm.nn.ffn import Mlp
from vlm.nn.route import PerRoute
from vlm.nn.state import State
from vlm.nn.tokens import Route, Tokens, count_positions


class QFormer(nn.Module):
    """Learned queries that look at an image every k-th block and share self-attention with a text.

    The three mask regimes: `query` and `read` (image and text apart, ITC), `fuse` (bidirectional, ITM),
    `write` (text sees the queries and earlier text, queries see no text: grounded generation).
    """

    def __init__(
        self,
        image_dim: int,
        dim: int,
        layers: int,
        heads: int,
        queries: int = 32,
        hidden: int | None = None,
        cross_every: int = 2,
        text: "TextBranch | None" = None,
        image_norm: nn.Module | None = None,
        out_dim: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-12,
    ) -> None:
        """`text`: vocabulary side, absent in stage 2; `image_norm`: what image tokens pass first (BLIP-2: a LayerNorm).

        `out_dim`: width of the language model that reads the queries.
        """
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        routes = [Route.QUERY] if text is None else [Route.QUERY, Route.TEXT]

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(dim, eps=eps)

        def block(i: int) -> Block:
            looks = Cross(CrossAttention(dim, image_dim, heads), PostNorm(norm(), dropout), Route.QUERY)
            return Block(
                Attention(dim, heads, bias=True),
                PerRoute({route: Mlp(dim, hidden) for route in routes}),
                PostNorm(norm(), dropout),
                PostNorm(PerRoute({route: norm() for route in routes}), dropout),
                looks if i % cross_every == 0 else None,
            )

        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.embed_norm, self.embed_dropout = norm(), nn.Dropout(dropout)
        self.text = text
        self.image_norm = nn.Identity() if image_norm is None else image_norm
        self.stack = Stack([block(i) for i in range(layers)])
        self.out = nn.Identity() if out_dim is None else nn.Linear(dim, out_dim)
        self.width, self.dim, self.tokens = dim, dim if out_dim is None else out_dim, queries
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal with deviation 0.02, no bias."""
        nn.init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q E"]:
        """The connector for a language model: queries after they have looked at the image, at its width."""
        out: Tensor = self.out(self.query(self.look(image), len(image)).hidden)
        return out

    def look(self, image: Float[Tensor, "B N C"]) -> ImageMemory:
        """The image as the cross-attentions see it: made once, used by every pass."""
        return self.stack.look(self.image_norm(image))

    def query(self, image: ImageMemory, batch: int) -> Output:
        """The queries alone; `state` of the result lets texts continue from it (`write`)."""
        out: Output = self.stack(self._queries(batch), image)
        return out

    def read(self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M T D"]:
        """A text alone, bidirectional."""
        hidden: Tensor = self.stack(self._words(ids, valid, causal=False)).hidden
        return hidden

    def fuse(self, image: ImageMemory, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"]) -> Float[Tensor, "M Q D"]:
        """Queries and text seeing each other; row m of `image` belongs to text m."""
        both = self._queries(len(ids)).concat(self._words(ids, valid, causal=False))
        hidden: Tensor = self.stack(both, image).hidden
        return hidden[:, : self.tokens]

    def write(
        self, ids: Int[Tensor, "M T"], valid: Bool[Tensor, "M T"], state: State, start: Int[Tensor, "M"] | None = None
    ) -> Output:
        """Text after queries (and text) that `state` remembers, causal; `start`: position of the first token."""
        out: Output = self.stack(self._words(ids, valid, causal=True, start=start), None, state)
        return out

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits of `write`'s hidden states."""
        return self._text().logits(hidden)

    def _text(self) -> "TextBranch":
        if self.text is None:
            raise ValueError("this Q-Former has no text branch: set model.connector.text=true to train ITC, ITM or LM")
        return self.text

    def _embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.embed_dropout(self.embed_norm(x))
        return out

    def _queries(self, batch: int) -> Tokens:
        return Tokens.of(self._embed(self.queries.expand(batch, -1, -1)), Route.QUERY, causal=False)

    def _words(self, ids: Tensor, valid: Tensor, causal: bool, start: Tensor | None = None) -> Tokens:
        position = count_positions(valid) if start is None else count_positions(valid) + start[:, None]
        return Tokens.of(self._embed(self._text()(ids, position)), Route.TEXT, causal, valid, position)


class TextBranch(nn.Module):
    """Words in and words out for a Q-Former: BERT's embeddings and a vocabulary head."""

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        max_tokens: int,
        transform: nn.Module | None = None,
        head: Literal["own", "tied", "none"] = "own",
    ) -> None:
        """`transform`: what stands before the vocabulary (BERT: dense, GELU, LayerNorm).

        `head`: weights of its own, the embedding's with a bias (BERT), or none in a branch that only reads.
        """
        super().__init__()
        self.max_tokens = max_tokens
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(max_tokens, dim)
        self.transform = nn.Identity() if transform is None else transform
        self.head = nn.Linear(dim, vocabulary) if head == "own" else None
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if head == "tied" else None

    @property
    def writes(self) -> bool:
        """Whether it has a vocabulary head."""
        return self.head is not None or self.bias is not None

    def forward(self, ids: Int[Tensor, "M T"], position: Int[Tensor, "M T"]) -> Float[Tensor, "M T D"]:
        """Embeddings before the Q-Former's embedding norm."""
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"a text of {ids.shape[1]} tokens is longer than the Q-Former's {self.max_tokens}")
        out: Tensor = self.embedding(ids) + self.position(position)
        return out

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits. ValueError without a head."""
        x: Tensor = self.transform(hidden)
        if self.head is not None:
            out: Tensor = self.head(x)
            return out
        if self.bias is None:
            raise ValueError("this Q-Former reads texts but has no vocabulary head to write them: LM needs one")
        return linear(x, self.embedding.weight, self.bias)


def bert_transform(dim: int, eps: float = 1e-12) -> nn.Module:
    """What BERT does to a hidden state before the vocabulary."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=eps))
