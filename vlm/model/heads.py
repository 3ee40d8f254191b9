"""Heads of the contrastive and the matching objective.

Letters: B images, Q vectors per image, M texts, C image width, D text width, E embedding width.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm.loss.contrastive import CLIP_LIMIT, contrast_logits


class ContrastiveHead(nn.Module):
    """Projects images and texts into one space of unit vectors and holds the temperature between them."""

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        dim: int,
        temperature: float = 0.07,
        bias: bool = False,
        image: nn.Module | None = None,
        text: nn.Module | None = None,
        logit_bias: float | None = None,
    ) -> None:
        """`temperature` is where it starts; it is learned. `image`, `text`: projections of another kind than a matrix.

        `logit_bias`: where a learned number starts that is added to every logit (SigLIP, whose logits are of
        probabilities and whose temperature has no bound); None: there is none.
        """
        super().__init__()
        self.image = nn.Linear(image_dim, dim, bias=bias) if image is None else image
        self.text = nn.Linear(text_dim, dim, bias=bias) if text is None else text
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.full((1,), logit_bias))
        self.limit = CLIP_LIMIT if logit_bias is None else math.inf
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))  # FSDP shards no scalars
        self.dim = dim

    def embed_image(self, image: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q E"]:
        """Unit vectors, in fp32 at least."""
        return normalize(self.image(image).float(), dim=-1)

    def embed_text(self, text: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        """Unit vectors, in fp32 at least."""
        return normalize(self.text(text).float(), dim=-1)

    def forward(self, image: Float[Tensor, "B Q E"], text: Float[Tensor, "M E"]) -> Float[Tensor, "B M"]:
        """Similarities of unit vectors divided by the temperature, plus the bias if there is one."""
        logits = contrast_logits(image, text, self.log_scale, self.limit)
        return logits if self.logit_bias is None else logits + self.logit_bias

    def probability(self, image: Float[Tensor, "B Q E"], text: Float[Tensor, "M E"]) -> Float[Tensor, "B M"]:
        """How likely each pair belongs together, on its own: SigLIP's sigmoid. Errors: a head without a logit bias."""
        if self.logit_bias is None:
            raise ValueError("this contrastive head ranks pairs and knows no probability of one: it has no logit bias")
        out: Tensor = self(image, text)
        return out.sigmoid()


class MatchingHead(nn.Module):
    """Two logits (apart, together) from every query, averaged: BLIP-2's ITM head."""

    def __init__(self, dim: int) -> None:
        """`dim`: width of the fused states."""
        super().__init__()
        self.classify = nn.Linear(dim, 2)

    def forward(self, fused: Float[Tensor, "M Q D"]) -> Float[Tensor, "M 2"]:
        """`fused`: states of the tokens that saw both image and text."""
        out: Tensor = self.classify(fused).mean(1)
        return out
