"""The training loop: step, accumulate, log, evaluate, save. Nothing in it depends on a configuration."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.nn.backend import fast_float32
from vlm.train.average import Average
from vlm.train.log import Log
from vlm.train.optim import rate, set_rate
from vlm.train.task import Task

MOST_SKIPPED = 10  # steps in a row without a finite gradient


@dataclass(frozen=True)
class Plan:
    """How long and how often; steps are optimizer steps."""

    steps: int
    accumulate: int = 1
    warmup: int = 0
    final_lr: float = 0.0
    clip: float | None = 1.0
    seed: int = 0
    eval_every: int | None = None
    save_every: int | None = None


class Interrupted(Exception):
    """Ctrl-C: the current step was finished and saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


def fit(
    task: Task,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    log: Log,
    precision: torch.dtype,
    save: Callable[[int], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
    average: Average | None = None,
    start: int = 0,
) -> None:
    """Trains from step `start` to the end; the last step is always saved.

    `batches` gives the micro-batches from there on. Errors: a gradient that stays non-finite; a final save that fails.
    """
    device = next(task.parameters()).device
    task.train()
    skipped = 0
    with catch_interrupt() as interrupted:
        for step in range(start, plan.steps):
            set_rate(optimizer, rate(step, plan.steps, plan.warmup, plan.final_lr))
            # Dropout and hard negatives depend on the step alone, so a resumed run needs no generator state.
            torch.manual_seed(plan.seed * 1_000_003 + step)
            group = [next(batches).to(device) for _ in range(plan.accumulate)]
            losses, norm = one_step(task, group, optimizer, plan.clip, precision)
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped >= MOST_SKIPPED:
                raise ValueError(
                    f"no finite gradient in the last {skipped} steps (up to {step + 1}): "
                    "lower the rates in train.params, or set train.precision=float32"
                )
            if average is not None:
                average.update(step)
            samples = float(sum(len(batch.images) for batch in group))
            lr = max(group["lr"] for group in optimizer.param_groups)
            log.step(step + 1, losses, {"grad_norm": norm, "lr": lr, "samples": samples})
            _between(step + 1, task, plan, log, save, evaluate, average, interrupted())


def _between(
    done: int,
    task: Task,
    plan: Plan,
    log: Log,
    save: Callable[[int], None],
    evaluate: Callable[[], dict[str, float]] | None,
    average: Average | None,
    interrupted: bool,
) -> None:
    last = done == plan.steps
    if evaluate is not None and (last or (plan.eval_every is not None and done % plan.eval_every == 0)):
        with ExitStack() as stack:
            if average is not None:
                stack.enter_context(average.applied())
            log.event(done, evaluate())
        task.train()
    if last or interrupted:
        save(done)
    elif plan.save_every is not None and done % plan.save_every == 0:
        try:
            save(done)
        except OSError as error:
            log.say(f"warning: {error}; training goes on and saves again after {plan.save_every} steps")
    if interrupted and not last:
        raise Interrupted(done)


def one_step(
    task: Task, group: list[Batch], optimizer: torch.optim.Optimizer, clip: float | None, precision: torch.dtype
) -> tuple[dict[str, float], float]:
    """One optimizer step over micro-batches: the losses as one big batch would have them, and the gradient's norm.

    A step whose gradient is not finite changes nothing.
    """
    optimizer.zero_grad(set_to_none=True)
    totals = {o.name: [o.share(batch) for batch in group] for o in task.objectives}
    each: dict[str, float] = {}
    for i, batch in enumerate(group):
        shares = {name: values[i] / sum(values) if sum(values) else 0.0 for name, values in totals.items()}
        with fast_float32():
            with autocast(batch.images.device, precision):
                losses = task(batch, shares)
            losses.total.backward()
        for name, loss in losses.each.items():
            each[name] = each.get(name, 0.0) + shares[name] * float(loss)
    norm = gradient_norm(task, clip)
    if math.isfinite(norm):
        optimizer.step()
    return each, norm


def gradient_norm(task: nn.Module, clip: float | None) -> float:
    """The norm of all gradients, before it is clipped to `clip`."""
    learning = [parameter for parameter in task.parameters() if parameter.requires_grad]
    norm: Tensor = nn.utils.clip_grad_norm_(learning, math.inf if clip is None else clip)
    return float(norm)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Products in `precision`; norms, softmax and losses stay in fp32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, so that a step is never torn; the second one interrupts at once."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread, where Python takes no handlers
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
