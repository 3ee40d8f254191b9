"""Connectors: image tokens to what the language model or the contrastive head reads. The Q-Former has its own file.

Letters: B batch, N image tokens, C image width, Q tokens after the connector, D width after it.
"""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


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
