"""What a step costs, counted once on a real batch: what is frozen is counted as it runs, forward alone."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlm.data.batch import Batch
from vlm.nn.backend import autocast, fast_float32
from vlm.train.aside import aside
from vlm.train.experts import experts_of
from vlm.train.task import Task


def flops_per_sample(task: Task, batch: Batch, precision: torch.dtype) -> float | None:
    """Of a forward and backward pass over `batch`; gradients go, all else stays. None where experts are not counted.

    Products and convolutions count, 2 for each multiply-add; nothing recomputed does, so attention's backward pass is
    twice its forward one.
    """
    if experts_of(task.model):
        return None
    with aside(task), fast_float32(), FlopCounterMode(display=False, custom_mapping=_attention()) as counter:
        with autocast(batch.owner.device, precision):
            total = task(batch).total
        total.backward()
    task.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / batch.size


def _attention() -> dict[Any, Any]:
    """Fused attention on every device: torch counts none on CPUs, and counts what others compute again."""
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    names = [f"_scaled_dot_product_{kind}" for kind in kinds]
    forward = {getattr(torch.ops.aten, name): _forward for name in names}
    return forward | {getattr(torch.ops.aten, f"{name}_backward"): _backward for name in names}


def _forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _backward(_: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * _forward(query, key, value)
