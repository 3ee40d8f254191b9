"""Why a step has no finite gradient: a second pass over its batches, with every module watched."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.data.batch import Batch
from vlm.nn.backend import autocast, fast_float32
from vlm.train.aside import aside
from vlm.train.parallel import Passes

SHOWN = 8  # sample keys in a message


def explain(passes: Passes, group: Sequence[Batch], seeds: Sequence[int]) -> str:
    """The first module (in order of the pass) whose output is not finite, or what else is not, and the samples.

    For a step that is skipped: its gradients go, weights, buffers and random numbers stay. All processes look at their
    own `group` and get the same answer.
    """
    with aside(passes.task), fast_float32():
        with torch.no_grad():
            faults = [_forward_fault(passes, batch, seed) for batch, seed in zip(group, seeds, strict=True)]
        if found := _first(passes, faults):
            return found
        faults = [_backward_fault(passes, batch, seed) for batch, seed in zip(group, seeds, strict=True)]
        return _first(passes, faults) or "every gradient is finite, but too large for their norm to be"


def _first(passes: Passes, faults: Sequence[str]) -> str:
    return next(filter(None, passes.world.texts(next(filter(None, faults), ""))), "")


def _backward_fault(passes: Passes, batch: Batch, seed: int) -> str:
    task = passes.task
    torch.manual_seed(seed)
    task.zero_grad(set_to_none=True)
    with autocast(batch.owner.device, passes.precision):
        total = task(batch).total
    total.backward()
    # Shards of weights have their gradients of all processes together, whose samples are not told apart here.
    samples = "" if passes.sharded else _samples(batch, [])
    bad = [name for name, p in task.model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return f"the losses are finite, but the gradient of {bad[-1]} is not{samples}" if bad else ""


def _finite(gradient: Tensor) -> bool:
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(own.isfinite().all())


def _forward_fault(passes: Passes, batch: Batch, seed: int) -> str:
    task = passes.task
    torch.manual_seed(seed)
    with _watched(task.model) as found, autocast(batch.owner.device, passes.precision):
        losses = task(batch).each  # whatever the pixels are: over sharded weights all processes make this pass together
    if batch.images is not None and (rows := _bad_rows(batch.images)):
        return f"the pixels are not finite{_samples(batch, rows)}"
    if found:
        name, output = found[0]
        rows = _bad_rows(output) if output.ndim > 1 and len(output) == len(batch.keys) else []
        return f"{name} is the first module whose output is not finite{_samples(batch, rows)}"
    bad = [name for name, loss in losses.items() if not loss.isfinite()]
    return f"the {bad[0]} loss is not finite{_samples(batch, [])}" if bad else ""


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Collects modules with an output that is not finite; the inner ones end first."""
    found: list[tuple[str, Tensor]] = []

    def watch(name: str, module: nn.Module) -> Any:
        def look(_: nn.Module, given: Any, output: Any) -> None:
            bad = [tensor for tensor in _tensors(output) if not tensor.isfinite().all()]
            if bad:
                broken = any(not p.isfinite().all() for p in module.parameters(recurse=False))
                found.append((f"{name} (whose own weights are not)" if broken else name, bad[0]))

        return module.register_forward_hook(look)

    hooks = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _bad_rows(tensor: Tensor) -> list[int]:
    rows: list[int] = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    return rows


def _samples(batch: Batch, rows: Sequence[int]) -> str:
    """Keys for a message: of `rows`, or of all; nothing for text, which has none."""
    keys = [batch.keys[i] for i in rows] or batch.keys
    if not keys:
        return ""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f", samples {', '.join(keys[:SHOWN])}{more}"
