"""Passes that are no training: made to count, to diagnose or to look ahead."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def aside(task: nn.Module) -> Iterator[None]:
    """A pass inside leaves no trace in random numbers and buffers (such as running means)."""
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]
    devices = sorted({p.device.index for p in task.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
