"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama.

Letters: B batch, S sequence, H heads, K head width, F frequencies (K / 2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
Scaling = Callable[[Tensor], Tensor]  # changes the frequencies, in radians per token


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        """Errors: a factor that would lengthen nothing."""
        _refuse_factor(self.factor)

    def __call__(self, frequency: Float[Tensor, "F"]) -> Float[Tensor, "F"]:
        """All frequencies alike."""
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch to longer texts: slow rotations by `factor`, fast ones not, those between blended.

    A wavelength is slow if it fits less than `low_freq_factor` times into the original length, fast if more than
    `high_freq_factor` times. Source: the released code of Llama 3.1 (arXiv 2407.21783 gives only theta).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        """Errors: bands that overlap, or a factor that would lengthen nothing."""
        _refuse_factor(self.factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}: "
                "above 0, and the first below the second"
            )

    def __call__(self, frequency: Float[Tensor, "F"]) -> Float[Tensor, "F"]:
        """Each frequency by its own share of the factor."""
        turns = self.original_max_positions / (2 * math.pi) * frequency
        fast = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequency * (fast + (1 - fast) / self.factor)


def _refuse_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"factor={factor}: how many times longer texts may get, so at least 1")


class Rotary(nn.Module):
    """Turns positions into the cosines and sines that rotate queries and keys."""

    def __init__(self, head_dim: int, theta: float = 10_000.0, scaling: Scaling | None = None) -> None:
        """`head_dim`: width of a head, even; `theta`: base of the geometric series of wavelengths."""
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {head_dim}: change dim or heads")
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling

    def forward(self, position: Int[Tensor, "B S"], dtype: torch.dtype = torch.float32) -> Angles:
        """Cosines, and sines with the sign of what they multiply; each B 1 S head_dim.

        `dtype`: fp32 or fp64, for bf16 cannot tell positions above 256 apart.
        """
        # Computed here and not kept as a buffer, so that a model built on the meta device has nothing to lose.
        steps = torch.arange(0, self.head_dim, 2, device=position.device, dtype=dtype)
        frequency = self.theta ** (-steps / self.head_dim)
        if self.scaling is not None:
            frequency = self.scaling(frequency)
        angle = position[:, None, :, None].to(dtype) * frequency
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Float[Tensor, "B H S K"], angles: Angles) -> Float[Tensor, "B H S K"]:
    """Rotates each head's pairs (i, i + K/2) by the angle of its position."""
    cos, sin = (part.to(x.dtype) for part in angles)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
