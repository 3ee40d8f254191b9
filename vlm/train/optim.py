"""Who learns and how fast: ordered patterns to parameter groups, and the schedule."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from vlm.nn.adapter import is_adapter
from vlm.train.muon import Muon, Together


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches learn at `lr`; None freezes them. The first rule that matches decides.

    A rule that decides over adapters (`model.lora`) means them alone: what else it matches in their part is frozen.
    """

    match: str
    lr: float | None
    weight_decay: float
    muon: float | None = None  # rate of Muon for the matrices and kernels among them; adapters': if `match` names lora


@dataclass(frozen=True)
class Line:
    """One line of the table of what trains."""

    part: str
    match: str
    lr: float | None
    tensors: int
    parameters: int


def assign(model: nn.Module, rules: Sequence[Rule], frozen_parts: Sequence[str] = ()) -> dict[str, Rule]:
    """The rule of every parameter that learns; freezes the others in place.

    `frozen_parts` are frozen by their own setting. Errors, all at once: a parameter that no rule matches, a rule that
    matches nothing, a pattern that is no regular expression, a rate for a frozen part.
    """
    faults = {rule.match: fault for rule in rules if (fault := _fault(rule.match))}
    patterns = [(i, re.compile(rule.match)) for i, rule in enumerate(rules) if rule.match not in faults]
    owner = {
        name: next((i for i, pattern in patterns if pattern.fullmatch(name)), None)
        for name, _ in model.named_parameters()
    }
    asleep = _asleep(owner, frozen_parts)
    problems = [*faults.values(), *_idle([(i, rules[i]) for i, _ in patterns], owner, asleep)]
    if not faults:  # a pattern that cannot be read may have been meant for what no other matches
        problems += _unmatched(owner, asleep)
    decided = {
        name: rules[i] for name, i in owner.items() if i is not None and rules[i].lr is not None and name not in asleep
    }
    problems += _coarse(model, decided)
    if not problems:
        problems = _nothing(owner, decided)
    if problems:
        shown = problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise ValueError("\n".join(shown))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in decided)
    return decided


def _asleep(owner: Mapping[str, int | None], frozen_parts: Sequence[str]) -> set[str]:
    """What stays frozen whatever rate a rule gives: frozen parts, and what stands beside the adapters it means."""
    frozen = tuple(f"{part}." for part in frozen_parts)
    meant = {(i, _part(name)) for name, i in owner.items() if i is not None and is_adapter(name)}
    return {
        name
        for name, i in owner.items()
        if not is_adapter(name) and (name.startswith(frozen) or (i, _part(name)) in meant)
    }


def _part(name: str) -> str:
    return name.partition(".")[0]


def _nothing(owner: Mapping[str, int | None], decided: Mapping[str, Rule]) -> list[str]:
    if not decided:
        return ["train.params: every parameter is frozen, so there is nothing to train"]
    if any(map(is_adapter, owner)) and not any(map(is_adapter, decided)):
        remedy = "put {match: '.*lora_.*', lr: …} before what freezes them"
        return [f"train.params: no adapter of model.lora has a rate; {remedy}"]
    return []


def _coarse(model: nn.Module, decided: Mapping[str, Rule]) -> list[str]:
    """Half precision loses small steps; what learns is kept in fp32 and computed as train.precision says."""
    half = [n for n, p in model.named_parameters() if n in decided and p.dtype in (torch.bfloat16, torch.float16)]
    parts = sorted({name.split(".")[0] for name in half})
    return [f"model.{part}.dtype: for weights that do not learn, and train.params gives some a rate" for part in parts]


def _unmatched(owner: Mapping[str, int | None], asleep: Collection[str]) -> list[str]:
    return [
        f"train.params: no pattern matches {name}; end the list with {{match: '.*', lr: null}}"
        for name, i in owner.items()
        if i is None and name not in asleep
    ]


def _idle(rules: Sequence[tuple[int, Rule]], owner: Mapping[str, int | None], asleep: Collection[str]) -> list[str]:
    """Rules that decide nothing, or that would wake what another setting freezes."""
    problems = []
    for i, rule in rules:
        names = [name for name, chosen in owner.items() if chosen == i]
        if not names:
            problems.append(f"train.params: '{rule.match}' matches no parameter that an earlier pattern left over")
        elif rule.lr is not None and all(name in asleep for name in names):
            problems.append(f"train.params: '{rule.match}' gives a rate to parts frozen by their own setting")
    return problems


def _fault(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"train.params: '{pattern}' is not a regular expression ({error})"
    return ""


def table(model: nn.Module, decided: dict[str, Rule]) -> list[Line]:
    """What trains, by part and rule, in the order of the model."""
    lines: dict[tuple[str, str, float | None], list[int]] = {}
    for name, parameter in model.named_parameters():
        rule = decided.get(name)
        key = (_part(name), rule.match if rule else "–", rule.lr if rule else None)
        lines.setdefault(key, []).append(parameter.numel())
    return [Line(part, match, lr, len(sizes), sum(sizes)) for (part, match, lr), sizes in lines.items()]


def make_optimizer(
    model: nn.Module, decided: Mapping[str, Rule], betas: tuple[float, float], eps: float = 1e-8
) -> Optimizer:
    """AdamW (fused) with one group per rate and decay, and Muon for the matrices of rules that ask for it.

    Single vectors (biases, norms, positions) are not decayed, and never Muon's.
    """
    adamw: dict[tuple[float, float], list[nn.Parameter]] = {}
    muon: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = decided.get(name)
        if rule is None:
            continue
        assert rule.lr is not None
        asked = rule.muon is not None and (not is_adapter(name) or "lora" in rule.match)
        if asked and parameter.ndim > 1:
            assert rule.muon is not None
            muon.setdefault((rule.muon, rule.weight_decay), []).append(parameter)
        else:
            decay = rule.weight_decay if parameter.ndim > 1 else 0.0
            adamw.setdefault((rule.lr, decay), []).append(parameter)
    plain = [AdamW(_groups(adamw), betas=betas, eps=eps, fused=True)] if adamw else []
    return Together([*plain, Muon(_groups(muon))]) if muon else plain[0]


def _groups(parameters: Mapping[tuple[float, float], list[nn.Parameter]]) -> list[dict[str, Any]]:
    return [
        {"params": alike, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), alike in parameters.items()
    ]


@dataclass(frozen=True)
class Schedule:
    """The factor on the peak rates, a pure function of the step: linear warm-up, then a curve from 1 to `final`.

    `drops`: from which share of all steps on the factor is multiplied by what (DeepSeek: 0.316 at 0.8 and at 0.9).
    """

    warmup: int = 0
    final: float = 0.0
    curve: Literal["cosine", "linear", "constant"] = "cosine"
    drops: Mapping[float, float] = field(default_factory=dict)

    def __call__(self, step: int, steps: int) -> float:
        """Of one step among all."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        shares = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        dropped = math.prod(factor for share, factor in self.drops.items() if step >= share * steps)
        return (self.final + (1 - self.final) * shares[self.curve]) * dropped


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
