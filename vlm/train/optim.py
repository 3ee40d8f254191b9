"""Who learns and how fast: ordered patterns to parameter groups, and the schedule."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches learn at `lr`; None freezes them. The first rule that matches decides."""

    match: str
    lr: float | None
    weight_decay: float


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
    patterns = [_compile(rule.match) for rule in rules]
    hits, decided, problems = [0] * len(rules), dict[str, Rule](), list[str]()
    asleep = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{p}." for p in frozen_parts))}
    woken = [0] * len(rules)
    for name, parameter in model.named_parameters():
        for i, pattern in enumerate(patterns):
            if pattern.fullmatch(name):
                hits[i] += 1
                woken[i] += name not in asleep
                if rules[i].lr is not None and name not in asleep:
                    decided[name] = rules[i]
                break
        else:
            if name not in asleep:
                problems.append(f"train.params: no pattern matches {name}; end the list with {{match: '.*', lr: null}}")
        parameter.requires_grad_(name in decided)
    for rule, hit, live in zip(rules, hits, woken, strict=True):
        if not hit:
            problems.append(f"train.params: '{rule.match}' matches no parameter that an earlier pattern left over")
        elif not live and rule.lr is not None:
            problems.append(f"train.params: '{rule.match}' gives a rate to parts frozen by their own setting")
    if not decided and not problems:
        problems.append("train.params: every parameter is frozen, so there is nothing to train")
    if problems:
        raise ValueError("\n".join(problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])))
    return decided


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"train.params: '{pattern}' is not a regular expression ({error})") from None


def table(model: nn.Module, decided: dict[str, Rule]) -> list[Line]:
    """What trains, by part and rule, in the order of the model."""
    lines: dict[tuple[str, str, float | None], list[int]] = {}
    for name, parameter in model.named_parameters():
        rule = decided.get(name)
        key = (name.split(".")[0], rule.match if rule else "–", rule.lr if rule else None)
        lines.setdefault(key, []).append(parameter.numel())
    return [Line(part, match, lr, len(sizes), sum(sizes)) for (part, match, lr), sizes in lines.items()]


def adamw(model: nn.Module, decided: dict[str, Rule], betas: tuple[float, float]) -> AdamW:
    """AdamW (fused) with one group per rate and decay; single vectors (biases, norms, positions) are not decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = decided.get(name)
        if rule is not None:
            assert rule.lr is not None
            decay = rule.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rule.lr, decay), []).append(parameter)
    listed = [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
    return AdamW(listed, betas=betas, fused=True)


def rate(step: int, steps: int, warmup: int, final: float) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine that ends at `final`. A pure function of the step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
