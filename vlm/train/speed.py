"""What a token costs and what the machine can do: model FLOPs utilisation against a measured peak."""

import time
from functools import cache

import torch
from torch import nn

from vlm.model.language import Decoder
from vlm.nn.attention import Attention
from vlm.nn.backend import fast_float32
from vlm.nn.block import Block
from vlm.nn.moe import MixtureOfExperts
from vlm.nn.retain import Chunkwise
from vlm.nn.retention import Retention


def flops_per_token(model: Decoder, length: int) -> float:
    """Of a forward and backward pass in texts of `length`: 6 for each weight that a token meets, and the mixing.

    Attention counts as 12 x width x length a layer, as is usual (PaLM, arXiv 2204.02311, appendix B), without
    subtracting what causality spares; retention by its chunks. Nothing recomputed counts.
    """
    weights = float(model.embedding.weight.numel())  # the head's, which is as large where it is apart
    mixing = 0.0
    for block in model.stack.blocks:
        assert isinstance(block, Block)
        weights += _active(block.mixer) + _active(block.ffn)
        mixing += _mixing(block.mixer, length)
    return 6 * weights + mixing


def _active(ffn: nn.Module) -> float:
    """Matrix weights that one token meets."""
    if not isinstance(ffn, MixtureOfExperts):
        return float(sum(parameter.numel() for parameter in ffn.parameters() if parameter.ndim > 1))
    routed = ffn.gate_up.numel() + ffn.down.numel()
    shared = 0 if ffn.shared is None else _active(ffn.shared)
    return ffn.router.weight.numel() + shared + routed * ffn.router.top_k / ffn.router.experts


def _mixing(mixer: nn.Module, length: int) -> float:
    if isinstance(mixer, Attention):
        return 12.0 * mixer.heads * mixer.head_dim * length
    if isinstance(mixer, Retention):
        key, value = mixer.head_dim, mixer.value_head_dim
        chunk = min(length, mixer.form.length if isinstance(mixer.form, Chunkwise) else length)
        return 6.0 * mixer.heads * (chunk * (key + value) + 2 * key * value)
    return 0.0


@cache
def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOPs a second of the fastest of several square products, as training runs them. Takes a fraction of a second."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    with torch.no_grad(), fast_float32():
        for _ in range(6):
            _wait(device)
            start = time.perf_counter()
            for _ in range(3):
                a @ b
            _wait(device)
            best = max(best, 3 * 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
