"""Muon: momentum made orthogonal before the step (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch's own Muon takes matrices only and computes in bf16, which CPUs without bf16 instructions emulate hundreds of
times slower; this one also takes convolution kernels (as out x the rest) and picks a dtype the device is fast in.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from vlm.nn.backend import bfloat16_is_fast

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic in the source: steep at 0, so that few rounds are enough


def orthogonalize(matrices: Float[Tensor, "L R C"], rounds: int = 5) -> Float[Tensor, "L R C"]:
    """Each matrix U S V^T to about U V^T: Newton-Schulz rounds that bring all singular values near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if matrices.is_cuda and bfloat16_is_fast(matrices.device) else torch.float32
    x: Tensor = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Orthogonalized Nesterov momentum for matrices and convolution kernels."""

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        """`params` as of any optimizer, each of two dimensions or more; `lr` is the size of a step, spectrally."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            flat = [tuple(parameter.shape) for parameter in group["params"] if parameter.ndim < 2]
            if flat:
                raise ValueError(f"Muon is for matrices and kernels, not for shapes {flat[:3]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; parameters of equal shape are orthogonalized together."""
        assert closure is None, "no closure is ever needed here"
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[len(parameter), parameter[0].numel()].append(parameter)
            for (rows, columns), parameters in alike.items():
                moved = torch.stack([self._momentum(p, group["momentum"]).reshape(rows, columns) for p in parameters])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, orthogonalize(moved), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(parameter.shape), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, keep: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        memory: Tensor = state["momentum"]
        memory.lerp_(gradient, 1 - keep)
        return gradient.lerp(memory, keep)


class Together(Optimizer):
    """Several optimizers for different parameters as one: same groups, same memory, one step."""

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        """`parts` share no parameter."""
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The very same groups and memory: a rate set here, or a memory loaded here, is the parts' own.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each part."""
        assert closure is None, "no closure is ever needed here"
        for part in self.parts:
            part.step()
