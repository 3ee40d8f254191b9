"""The training loop: step, accumulate, log, evaluate, save. Nothing in it depends on a configuration."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.nn.backend import fast_float32
from vlm.train.average import Average
from vlm.train.experts import Health
from vlm.train.log import Log
from vlm.train.optim import rate, set_rate
from vlm.train.pool import pooled
from vlm.train.task import BALANCE, Itc, Lm, Task, autocast

Save = Callable[[int, float, bool], None]  # step, lowest validation loss so far, whether it is this step's
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
    keep_best: bool = False


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
    save: Save,
    evaluate: Callable[[], dict[str, float]] | None = None,
    average: Average | None = None,
    start: int = 0,
    health: Health | None = None,
    best: float = math.inf,
) -> None:
    """Trains from step `start` to the end; the last step is always saved.

    `batches` gives the micro-batches from there on; `health`: of mixtures of experts; `best`: lowest validation loss
    of an earlier part of the run. Errors: a gradient that stays non-finite; a final save that fails.
    """
    device = next(task.parameters()).device
    between = _Between(task, plan, log, save, evaluate, average, best)
    task.train()
    skipped = 0
    with catch_interrupt() as interrupted:
        for step in range(start, plan.steps):
            set_rate(optimizer, rate(step, plan.steps, plan.warmup, plan.final_lr))
            # Dropout and hard negatives depend on the step alone, so a resumed run needs no generator state.
            torch.manual_seed(plan.seed * 1_000_003 + step)
            group = [next(batches).to(device) for _ in range(plan.accumulate)]
            losses, norm = one_step(task, group, optimizer, plan.clip, precision, health)
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped >= MOST_SKIPPED:
                raise ValueError(
                    f"no finite gradient in the last {skipped} steps (up to {step + 1}): "
                    "lower the rates in train.params, or set train.precision=float32"
                )
            if average is not None:
                average.update(step)
            lr = max(group["lr"] for group in optimizer.param_groups)
            log.step(step + 1, losses, {"grad_norm": norm, "lr": lr}, _counts(group))
            between(step + 1, interrupted())


def _counts(group: list[Batch]) -> dict[str, float]:
    """What a step has been through: samples, and tokens where there is nothing but text."""
    counts = {"samples": float(sum(batch.size for batch in group))}
    if group[0].images is None:
        counts["tokens"] = float(sum(batch.captions.ids.numel() for batch in group))
    return counts


class _Between:
    """What happens between steps: validation, saving, stopping."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        log: Log,
        save: Save,
        evaluate: Callable[[], dict[str, float]] | None,
        average: Average | None,
        best: float,
    ) -> None:
        self.task, self.plan, self.log, self.save = task, plan, log, save
        self.evaluate, self.average, self.best = evaluate, average, best

    def __call__(self, done: int, interrupted: bool) -> None:
        last, improved = done == self.plan.steps, False
        if self.evaluate is not None and (last or _due(done, self.plan.eval_every)):
            loss = self._validate(done)
            improved = self.plan.keep_best and loss < self.best
            self.best = min(self.best, loss)
        if last or interrupted or improved:
            self.save(done, self.best, improved)
        elif _due(done, self.plan.save_every):
            try:
                self.save(done, self.best, False)
            except OSError as error:
                self.log.say(f"warning: {error}; training goes on and saves again after {self.plan.save_every} steps")
        if interrupted and not last:
            raise Interrupted(done)

    def _validate(self, done: int) -> float:
        """The weighted sum of the validation losses."""
        assert self.evaluate is not None
        with ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.applied())
            values = self.evaluate()
        self.log.event(done, values)
        self.task.train()
        return sum(o.weight * values[f"val/loss_{o.name}"] for o in self.task.objectives)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def one_step(
    task: Task,
    group: list[Batch],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    precision: torch.dtype,
    health: Health | None = None,
) -> tuple[dict[str, float], float]:
    """One optimizer step over micro-batches: the losses as one big batch would have them, and the gradient's norm.

    A step whose gradient is not finite changes nothing.
    """
    optimizer.zero_grad(set_to_none=True)
    totals = {o.name: [o.share(batch) for batch in group] for o in task.objectives}
    each: dict[str, float] = {}
    passes = []
    whole = pooled(task, group, precision)
    for i, batch in enumerate(group):
        shares = {name: values[i] / sum(values) if sum(values) else 0.0 for name, values in totals.items()}
        if whole is not None:
            torch.manual_seed(whole.seeds[i])
        with fast_float32():
            with autocast(batch.owner.device, precision):
                losses = task(batch, shares, None if whole is None else whole.pulls[i])
            losses.total.backward()
        passes.append(losses.routings)
        shares[BALANCE] = shares.get(Lm.name, 0.0)
        for name, loss in losses.each.items():
            each[name] = each.get(name, 0.0) + shares[name] * float(loss)
    if whole is not None:
        each[Itc.name] = whole.loss
    norm = gradient_norm(task, clip)
    if math.isfinite(norm):
        optimizer.step()
        if health is not None:
            health.step(passes)
    return each, norm


def gradient_norm(task: nn.Module, clip: float | None) -> float:
    """The norm of all gradients, before it is clipped to `clip`."""
    learning = [parameter for parameter in task.parameters() if parameter.requires_grad]
    norm: Tensor = nn.utils.clip_grad_norm_(learning, math.inf if clip is None else clip)
    return float(norm)


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
