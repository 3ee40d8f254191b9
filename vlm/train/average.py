"""Exponential moving average of the weights that learn, for evaluation and for what comes after the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm import sharded
from vlm.model.weights.files import read


class Average:
    """average = decay * average + (1 - decay) * weights, with a short memory in the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts from the weights as they are; `decay` below 1."""
        self.decay = decay
        self._live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.tensors: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step` (from 0). The memory grows with the steps, so that the start is forgotten soon."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._live.values()), 1 - decay)

    def load(self, path: Path) -> None:
        """Takes up a saved average. Errors: other names than the weights that learn."""
        given = read(path)
        if set(given) != set(self.tensors):
            raise ValueError(f"{path} averages other weights than those that learn now: compare train.params")
        for name, tensor in self.tensors.items():
            tensor.copy_(sharded.like(given[name].to(tensor.device), tensor))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights inside, with its own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(source[name])
