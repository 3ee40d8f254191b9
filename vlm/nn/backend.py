"""What this machine computes fast, found out by trying it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

EXACT = 2e-6  # relative error up to which a product still counts as fp32
FEW = 2  # rows of a product that oneDNN computes slower than the default


@cache
def onednn_is_exact() -> bool:
    """Does oneDNN compute fp32 products in true fp32 when it is allowed to round? (Where it cannot, it is just faster.)

    The public switch permits bf16 inside an fp32 product. CPUs with AMX would use that; others have no such kernel and
    run their full-width fp32 one, about twice as fast as the default on some machines.
    """
    if not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported():
        return False
    maker = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 256, generator=maker), torch.randn(256, 64, generator=maker)
    exact = left.double() @ right.double()
    with _allowed("bf16"):
        error = ((left @ right).double() - exact).norm() / exact.norm()
    return bool(error < EXACT)


@contextmanager
def fast_float32() -> Iterator[None]:
    """Sends fp32 matrix products to oneDNN inside, where that is exact; does nothing elsewhere."""
    if not onednn_is_exact():
        yield
        return
    with _allowed("bf16"):
        yield


@contextmanager
def default_for_few(rows: int) -> Iterator[None]:
    """Takes products of so few rows back from oneDNN, which is up to twice slower than the default below three rows."""
    if rows > FEW or not onednn_is_exact():
        yield
        return
    with _allowed("ieee"):
        yield


@contextmanager
def _allowed(precision: str) -> Iterator[None]:
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch sets it when imported
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Products in `precision`; norms, softmax and losses stay in fp32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Has the device instructions for bf16 products? Without them bf16 is emulated and slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
