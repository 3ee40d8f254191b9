"""Mixtures of experts while training: balance by bias, equal on all processes, and what the log tells of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.nn.moe import MixtureOfExperts, Routing, update_bias
from vlm.world import World

STARVED = 0.1  # of its fair share of tokens: an expert below it counts as unused


def experts_of(model: nn.Module) -> list[MixtureOfExperts]:
    """All mixtures of a model, in the order in which a pass meets them."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


class Health:
    """Loads and entropies of the mixtures since the last report."""

    def __init__(self, mixtures: Sequence[MixtureOfExperts], bias_rate: float | None = None) -> None:
        """`bias_rate`: step of the selection bias (loss-free balancing); None where losses balance."""
        self.mixtures, self.bias_rate = list(mixtures), bias_rate
        self._loads = self._entropy = self._dropped = torch.zeros(())
        self._passes = 0

    def step(self, passes: Sequence[Sequence[Routing]], world: World) -> None:
        """After an optimizer step: moves the biases by the loads of all its passes and processes, and keeps count."""
        if not self.mixtures:
            return
        loads = world.add(torch.stack([torch.stack([r.load for r in routings]) for routings in passes]).sum(0))
        if self.bias_rate is not None:
            for mixture, load in zip(self.mixtures, loads, strict=True):
                if mixture.gate_up.requires_grad:  # what is frozen stays as it is
                    update_bias(mixture.router, load, self.bias_rate)
        entropy = torch.stack([torch.stack([r.entropy for r in routings]) for routings in passes]).sum(0)
        dropped = torch.stack([r.dropped for routings in passes for r in routings]).sum()
        self._loads = self._loads.to(loads.device) + loads
        self._entropy = self._entropy.to(loads.device) + world.add(entropy)
        self._dropped = self._dropped.to(loads.device) + world.add(dropped)
        self._passes += len(passes) * world.size

    def pending(self) -> dict[str, Any]:
        """What the next report will tell of steps that are done, as JSON can hold it."""
        parts = (self._loads, self._entropy, self._dropped)
        return {"sums": [part.tolist() for part in parts], "passes": self._passes}

    def take_up(self, pending: Mapping[str, Any]) -> None:
        """Goes on where an earlier part of the run was."""
        self._loads, self._entropy, self._dropped = (torch.tensor(part) for part in pending["sums"])
        self._passes = pending["passes"]

    def report(self) -> "Report | None":
        """What happened since the last report; None without experts or steps."""
        if not self._passes:
            return None
        loads, entropy = self._loads.double().cpu(), (self._entropy / self._passes).double().cpu()
        dropped = float(self._dropped)
        self._loads = self._entropy = self._dropped = torch.zeros(())
        self._passes = 0
        return Report(loads / loads.sum(1, keepdim=True).clamp_min(1) * loads.shape[1], entropy, dropped)


class Report:
    """Loads relative to a fair share (1: fair), layer by layer, and the routers' entropies."""

    def __init__(self, load: Float[Tensor, "L E"], entropy: Float[Tensor, "L"], dropped: float) -> None:
        self.load, self.entropy, self.dropped = load, entropy, dropped

    def values(self) -> Mapping[str, float | list[float]]:
        """For the log: extremes over all layers, then every layer's loads."""
        found: dict[str, float | list[float]] = {
            "experts/load_max": float(self.load.max()),
            "experts/load_min": float(self.load.min()),
            "experts/unused": float((self.load < STARVED).sum()),
            "experts/entropy": float(self.entropy.mean()),
            "experts/dropped": self.dropped,
        }
        return found | {f"experts/load/{i}": row.tolist() for i, row in enumerate(self.load)}

    def warning(self) -> str:
        """Which layers have lost half of their experts or more; empty when none has."""
        lost = [(i, int((row < STARVED).sum())) for i, row in enumerate(self.load)]
        worst = [
            f"{count} of {self.load.shape[1]} in mixture {i}" for i, count in lost if 2 * count >= len(self.load[i])
        ]
        if not worst:
            return ""
        return (
            f"warning: experts that get less than {STARVED:.0%} of a fair share: {', '.join(worst)}. "
            "Raise model.language.ffn.balance, or set ffn.bias_rate"
        )
