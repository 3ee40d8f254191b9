"""An encoder's tokens made fewer: averaged over the cells of a coarser grid, and centred.

Letters: B batch, N tokens of the encoder, S cells, C image width, P pictures.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vlm.model.vision import ImageEncoder


class GridEncoder(nn.Module):
    """A frozen image encoder behind a grid of `side` x `side` cells, which are few enough to be kept for every view.

    Features of convolutional encoders are never negative: most of their length is the same for all pictures. Without it
    (`centre`) directions tell pictures apart.
    """

    mean: Tensor

    def __init__(self, encoder: ImageEncoder, side: int) -> None:
        """ValueError: tokens that form no square of at least `side`."""
        super().__init__()
        self.own_side = math.isqrt(encoder.tokens)
        if self.own_side**2 != encoder.tokens or side > self.own_side:
            raise ValueError(f"{encoder.tokens} image tokens form no square of {side} x {side} cells or more")
        self.encoder, self.side = encoder, side
        self.transform, self.dim, self.tokens = encoder.transform, encoder.dim, side * side
        self.register_buffer("mean", torch.zeros(self.dim))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B S C"]:
        """Cells row by row."""
        rows: Tensor = self.encoder(images)
        grid = rows.transpose(1, 2).unflatten(2, (self.own_side, self.own_side)).float()
        return functional.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2) - self.mean

    @torch.no_grad()
    def centre(self, cells: Float[Tensor, "*P S C"]) -> None:
        """From now on the mean of these cells, which this encoder gave before, is zero; they are changed in place."""
        mean = cells.flatten(0, -2).mean(0)
        cells.sub_(mean)
        self.mean.add_(mean)
