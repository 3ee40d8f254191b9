"""Published weights into a module and back, a few tensors at a time, so that little more than the model is in memory."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.model.weights.files import differences, refuse, shape
from vlm.model.weights.source import FOLDER, INDEX, SINGLE, Weights
from vlm.model.weights.table import Conversion, Stacked, Table, Unit


@dataclass(frozen=True)
class Target:
    """What becomes of published tensors: floating ones `dtype` (None: as published), all of them on `device`.

    `keep`: patterns, each for whole names of ours, of tensors that stay as published (a temperature in fp32).
    """

    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    keep: Sequence[str] = ()

    def type_of(self, name: str, like: Tensor) -> torch.dtype:
        """Of our tensor of that name."""
        kept = any(re.fullmatch(pattern, name) for pattern in self.keep)
        return like.dtype if self.dtype is None or kept or not like.is_floating_point() else self.dtype


def fill(
    module: nn.Module,
    table: Table,
    weights: Weights,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep: Sequence[str] = (),
) -> None:
    """Gives a module that was built on the meta device its published weights, with memory for these and little more.

    `dtype`: of floating tensors (None: as published), but for those of ours that a pattern in `keep` matches whole.
    Buffers that are in no file stay where they are made, or are made by their module (`init_non_persistent_buffers`).

    ValueError, before any weights are read: names or shapes that differ, all listed; a pattern in `keep` that matches
    nothing; buffers that nothing makes. While they are read: a file that was cut off, tied tensors that differ.
    """
    target = Target(dtype, device, keep)
    slots = _slots(module)
    units = _plan(table, weights, {name: module.get_parameter(name) if False else tensor for name, tensor in _own(module).items()}, keep)
    _make_buffers(module, device)
