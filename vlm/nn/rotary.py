"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]


class Rotary(nn.Module):
    """Turns positions into the cosines and sines that rotate queries and keys."""

    def __init__(self, head_dim: int, theta: float = 10_000.0) -> None:
        """`head_dim`: width of a head, even; `theta`: base of the geometric series of wavelengths."""
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {head_dim}: change dim or heads")
        self.head_dim, self.theta = head_dim, theta

    def forward(self, position: Int[Tensor, "B S"]) -> Angles:
        """Cosines and sines, each B 1 S head_dim, in fp32: bf16 cannot tell positions above 256 apart."""
        # Computed here and not kept as a buffer, so that a model built on the meta device has nothing to lose.
        steps = torch.arange(0, self.head_dim, 2, device=position.device, dtype=torch.float32)
        frequency = self.theta ** (-steps / self.head_dim)
        angle = position[:, None, :, None].float() * frequency
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def rotate(x: Float[Tensor, "B H S K"], angles: Angles) -> Float[Tensor, "B H S K"]:
    """Rotates each head's pairs (i, i + K/2) by the angle of its position."""
    cos, sin = (part.to(x.dtype) for part in angles)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
