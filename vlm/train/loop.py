"""The training loop: step, accumulate, log, evaluate, save. Nothing in it depends on a configuration."""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.data.batch import Batch
from vlm.nn.backend import autocast, fast_float32
from vlm.train.average import Average
from vlm.train.diagnose import explain
from vlm.train.experts import Health
from vlm.train.log import Log
from vlm.train.optim import rate, set_rate
from vlm.train.pool import pooled
from vlm.train.signals import Interrupted, catch_signals
from vlm.train.task import BALANCE, Itc, Lm, Task

Save = Callable[[int, float, bool], None]  # step, lowest validation loss so far, whether it is this step's


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
    max_bad_steps: int = 5  # in a row, without a finite gradient


@dataclass
class Progress:
    """What a run remembers beside weights; saved and taken up again with them."""

    samples_crc: int = 0  # CRC-32 over the keys of all samples so far, in order: equal runs saw equal data
    bad: int = 0  # steps without a finite gradient
    bad_in_a_row: int = 0

    def see(self, group: Sequence[Batch]) -> None:
        """Takes note of what a step trains on: keys, or token ids where there are no keys."""
        for batch in group:
            seen = "\n".join(batch.keys).encode() if batch.keys else batch.captions.ids.numpy().tobytes()
            self.samples_crc = zlib.crc32(seen, self.samples_crc)

    def facts(self) -> dict[str, float]:
        """For the log."""
        return {"samples_crc": float(self.samples_crc), "bad_steps": float(self.bad)}


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
    progress: Progress | None = None,
) -> None:
    """Trains from step `start` to the end; the last step is always saved.

    `batches` gives the micro-batches from there on; `health`: of mixtures of experts; `best`: lowest validation loss
    of an earlier part of the run, as `progress` is. Errors: a gradient that stays non-finite; a final save that fails.
    """
    progress = progress or Progress()
    device = next(task.parameters()).device
    between = _Between(task, plan, log, save, evaluate, average, best)
    task.train()
    with catch_signals() as asked:
        for step in range(start, plan.steps):
            set_rate(optimizer, rate(step, plan.steps, plan.warmup, plan.final_lr))
            began = time.perf_counter()
            group = [next(batches) for _ in range(plan.accumulate)]
            waited = time.perf_counter() - began
            progress.see(group)
            group = [batch.to(device) for batch in group]
            # Dropout and hard negatives depend on the step alone, so a resumed run needs no generator state.
            torch.manual_seed(plan.seed * 1_000_003 + step)
            losses, norm = one_step(task, group, optimizer, plan.clip, precision, health)
            if math.isfinite(norm):
                progress.bad_in_a_row = 0
            else:
                _skip(step, task, group, plan, precision, log, progress)
            if average is not None:
                average.update(step)
            lr = max(group["lr"] for group in optimizer.param_groups)
            facts = {"grad_norm": norm, "lr": lr, **progress.facts()}
            log.step(step + 1, losses, facts, _counts(group), waited)
            between(step + 1, asked())


def _skip(
    step: int,
    task: Task,
    group: Sequence[Batch],
    plan: Plan,
    precision: torch.dtype,
    log: Log,
    progress: Progress,
) -> None:
    """Counts a step that changed nothing and says where it broke. Errors: too many in a row."""
    progress.bad += 1
    progress.bad_in_a_row += 1
    first, last = progress.bad_in_a_row == 1, progress.bad_in_a_row >= plan.max_bad_steps
    if not (first or last):
        return
    reason = explain(task, group, plan.seed * 1_000_003 + step, precision)
    if last:
        raise ValueError(
            f"no finite gradient in the last {progress.bad_in_a_row} steps (up to {step + 1}): {reason}. Look at these "
            "samples, lower the rates in train.params, or set train.precision=float32; see train.max_bad_steps"
        )
    log.say(f"warning: step {step + 1} has no finite gradient and is skipped ({progress.bad} so far): {reason}")


def _counts(group: Sequence[Batch]) -> dict[str, float]:
    """What a step has been through: samples, and tokens of their texts (with those that stand for the picture)."""
    texts = [batch.captions if batch.prompts is None else batch.prompts for batch in group]
    tokens = sum(text.ids.numel() if text.full else int(text.valid.sum()) for text in texts)
    return {"samples": float(sum(batch.size for batch in group)), "tokens": float(tokens)}


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

    def __call__(self, done: int, signal: int) -> None:
        last, improved = done == self.plan.steps, False
        if self.evaluate is not None and (last or _due(done, self.plan.eval_every)):
            loss = self._validate(done)
            improved = self.plan.keep_best and loss < self.best
            self.best = min(self.best, loss)
        if last or signal or improved:
            self.save(done, self.best, improved)
        elif _due(done, self.plan.save_every):
            try:
                self.save(done, self.best, False)
            except OSError as error:
                self.log.say(f"warning: {error}; training goes on and saves again after {self.plan.save_every} steps")
        if signal and not last:
            raise Interrupted(done, signal)

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
