"""Connectors: image tokens to what the language model or the contrastive head reads. The Q-Former has its own file.

Letters: B batch, N image tokens, C image width, Q tokens after the connector, D width after it.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vlm.nn.attention import CrossAttention


class MlpConnector(nn.Module):
    """Linear layers with GELU between them; depth 1 is LLaVA's linear map, depth 2 LLaVA-1.5's (arXiv 2310.03744)."""

    def __init__(self, image_dim: int, dim: int, tokens: int, depth: int = 2, hidden: int | None = None) -> None:
        """`tokens`: image tokens, which all pass; `hidden` is `dim` unless given."""
        super().__init__()
        widths = [image_dim] + [dim if hidden is None else hidden] * (depth - 1) + [dim]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.GELU()] * (i > 0) + [nn.Linear(before, after)]
        self.layers = nn.Sequential(*layers)
        self.tokens, self.dim = tokens, dim

    def forward(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        """One token out for each in."""
        out: Tensor = self.layers(image)
        return out


class PrefixConnector(MlpConnector):
    """All image tokens as one vector, through an `MlpConnector` to several tokens at once.

    ClipCap's mapping network (arXiv 2111.09734): every token out sees the whole picture and has weights of its own. The
    vector is brought to mean 0 and deviation 1; tokens are normalised, so that they stay as long as the words that the
    language model knows, whether the picture is one of those trained on or not.
    """

    def __init__(
        self, image_dim: int, dim: int, image_tokens: int, tokens: int, depth: int = 2, hidden: int | None = None
    ) -> None:
        """`image_tokens` come in, `tokens` go out; `hidden` is `dim` unless given."""
        super().__init__(image_tokens * image_dim, tokens * dim, tokens, depth, dim if hidden is None else hidden)
        self.dim, self.norm = dim, nn.LayerNorm(dim)

    def vector(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B V"]:
        """The whole picture, as the first layer takes it."""
        flat = image.flatten(1)
        return functional.layer_norm(flat, flat.shape[1:])

    def forward(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q D"]:
        """Tokens of the whole picture."""
        rows: Tensor = self.layers(self.vector(image)).unflatten(1, (self.tokens, self.dim))
        out: Tensor = self.norm(rows.float())  # autocast would hand it another dtype than its weight has
        return out


class MeanPool(nn.Module):
    """The mean of all image tokens as one token: CLIP-style embeddings of convolutional grids."""

    def __init__(self, image_dim: int) -> None:
        """`image_dim` is also the width of the result."""
        super().__init__()
        self.tokens, self.dim = 1, image_dim

    def forward(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B 1 C"]:
        """Mean over the tokens."""
        return image.mean(1, keepdim=True)


class FirstToken(MeanPool):
    """The class token alone: CLIP's ViTs."""

    def forward(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B 1 C"]:
        """The first token."""
        return image[:, :1]


class AttentionPool(nn.Module):
    """Learned queries that look at the image once: SigLIP's pooling head (one query) and CoCa's pooler (256).

    Sources: Zhai et al. 2022 (arXiv 2106.04560), Yu et al. 2022 (arXiv 2205.01917).
    """

    def __init__(
        self,
        image_dim: int,
        dim: int,
        queries: int,
        heads: int,
        ffn: nn.Module | None = None,
        norms: Callable[[int], nn.Module] | None = None,
        ffn_norm: nn.Module | None = None,
        out_norm: nn.Module | None = None,
    ) -> None:
        """`ffn`: added to what the queries saw, from behind `ffn_norm`; `norms`: makes those of queries and image."""
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.query_norm = nn.Identity() if norms is None else norms(dim)
        self.image_norm = nn.Identity() if norms is None else norms(image_dim)
        self.attention = CrossAttention(dim, image_dim, heads)
        self.ffn = ffn
        self.ffn_norm = nn.Identity() if ffn_norm is None else ffn_norm
        self.out_norm = nn.Identity() if out_norm is None else out_norm
        self.tokens, self.dim = queries, dim
        nn.init.normal_(self.queries, std=dim**-0.5)

    def forward(self, image: Float[Tensor, "B N C"]) -> Float[Tensor, "B Q D"]:
        """One token for each query."""
        query = self.query_norm(self.queries).expand(len(image), -1, -1)
        x = self.attention(query, self.attention.project(self.image_norm(image)))
        if self.ffn is not None:
            x = x + self.ffn(self.ffn_norm(x))
        out: Tensor = self.out_norm(x)
        return out
