"""Connectors: image tokens to what the language model or the contrastive head reads. The Q-Former has its own file.

Letters: B batch, N image tokens, C image width, Q tokens after the connector, D width after it.
"""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


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
