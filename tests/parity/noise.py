"""Shared by the parity tests: every parameter gets noise, because zeros and ones hide errors."""

import torch
from torch import nn


def noise(module: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Fills all parameters, gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * scale
        gain = name.endswith("weight") and parameter.ndim == 1
        parameter.data = values + 1 if gain else values


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((ours - theirs).detach().abs().max())
