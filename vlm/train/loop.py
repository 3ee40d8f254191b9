"""The training loop: step, accumulate, log, evaluate, save. Nothing in it depends on a configuration.

The forward passes of a step are numbered lanes; process r of W makes the lanes r, r + W, … What a lane computes depends
on (seed, step, lane) alone, so a run may go on with any number of processes that divides the lanes.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.data.batch import Batch
from vlm.train.average import Average
from vlm.train.diagnose import explain
from vlm.train.experts import Health
from vlm.train.log import Log, Quiet
from vlm.train.optim import rate, set_rate
from vlm.train.parallel import Passes
from vlm.train.pool import pooled
from vlm.train.signals import Interrupted, catch_signals
from vlm.train.task import BALANCE, Itc, Lm, Task
from vlm.world import World, exchanging

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

    def see(self, lanes: Sequence[int]) -> None:
        """Takes note of what a step trains on: see `mark`, of all its lanes in order."""
        for lane in lanes:
            self.samples_crc = zlib.crc32(lane.to_bytes(4, "little"), self.samples_crc)

    def facts(self) -> dict[str, float]:
        """For the log."""
        return {"samples_crc": float(self.samples_crc), "bad_steps": float(self.bad)}


def mark(batch: Batch) -> int:
    """CRC-32 over the keys of a batch, or over token ids where there are no keys."""
    return zlib.crc32("\n".join(batch.keys).encode() if batch.keys else batch.captions.ids.numpy().tobytes())


def seed_of(seed: int, step: int, lane: int) -> int:
    """For what is drawn in a forward pass: dropout and hard negatives. No generator's state is carried along."""
    return (seed * 1_000_003 + step + lane * 0x9E3779B97F4A7C15) % 2**63


def fit(
    passes: Passes,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    log: Log | Quiet,
    save: Save,
    evaluate: Callable[[], dict[str, float]] | None = None,
    average: Average | None = None,
    start: int = 0,
    health: Health | None = None,
    best: float = math.inf,
    progress: Progress | None = None,
) -> None:
    """Trains from step `start` to the end; the last step is always saved.

    `batches` gives this process's micro-batches from there on; `health`: of mixtures of experts; `best`: lowest
    validation loss of an earlier part of the run, as `progress` is. Errors: a gradient that stays non-finite; a final
    save that fails; a process that is lost.
    """
    progress, world, task = progress or Progress(), passes.world, passes.task
    lanes = world.share(plan.accumulate)
    between = _Between(task, plan, log, save, evaluate, average, best)
    task.train()
    with catch_signals() as asked, exchanging():
        for step in range(start, plan.steps):
            set_rate(optimizer, rate(step, plan.steps, plan.warmup, plan.final_lr))
            began = time.perf_counter()
            group = [next(batches) for _ in lanes]
            waited = time.perf_counter() - began
            counts = _exchanged(world, plan.accumulate, group, progress)
            group = [batch.to(world.device) for batch in group]
            seeds = [seed_of(plan.seed, step, lane) for lane in lanes]
            losses, norm = one_step(passes, group, seeds, optimizer, plan.clip, health)
            if math.isfinite(norm):
                progress.bad_in_a_row = 0
            else:
                _skip(step, passes, group, seeds, plan, log, progress)
            if average is not None:
                average.update(step)
            lr = max(group["lr"] for group in optimizer.param_groups)
            log.step(step + 1, losses, {"grad_norm": norm, "lr": lr, **progress.facts()}, counts, waited)
            between(step + 1, world.most(asked()))


def _exchanged(world: World, lanes: int, group: Sequence[Batch], progress: Progress) -> dict[str, float]:
    """What the step goes through in all processes: noted in `progress`, counted by samples and tokens.

    Tokens are those of the texts, with what stands for the picture.
    """
    marks = [0] * lanes
    for lane, batch in zip(world.share(lanes), group, strict=True):
        marks[lane] = mark(batch)
    read = [batch.captions if batch.prompts is None else batch.prompts for batch in group]
    texts = [*read, *(text.reply for text in read if text.reply is not None)]
    seen = sum(text.ids.numel() if text.full else int(text.valid.sum()) for text in texts)
    samples, tokens, *every = world.sum([sum(batch.size for batch in group), seen, *marks])
    progress.see([int(number) for number in every])
    return {"samples": samples, "tokens": tokens}


def _skip(
    step: int,
    passes: Passes,
    group: Sequence[Batch],
    seeds: Sequence[int],
    plan: Plan,
    log: Log | Quiet,
    progress: Progress,
) -> None:
    """Counts a step that changed nothing and says where it broke. Errors: too many in a row."""
    progress.bad += 1
    progress.bad_in_a_row += 1
    first, last = progress.bad_in_a_row == 1, progress.bad_in_a_row >= plan.max_bad_steps
    if not (first or last):
        return
    reason = explain(passes, group, seeds)
    if last:
        raise ValueError(
            f"no finite gradient in the last {progress.bad_in_a_row} steps (up to {step + 1}): {reason}. Look at these "
            "samples, lower the rates in train.params, or set train.precision=float32; see train.max_bad_steps"
        )
    log.say(f"warning: step {step + 1} has no finite gradient and is skipped ({progress.bad} so far): {reason}")


class _Between:
    """What happens between steps: validation, saving, stopping."""

    def __init__(
        self,
        task: Task,
        plan: Plan,
        log: Log | Quiet,
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
    passes: Passes,
    group: Sequence[Batch],
    seeds: Sequence[int],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    health: Health | None = None,
) -> tuple[dict[str, float], float]:
    """One optimizer step over micro-batches: the losses as one big batch would have them, and the gradient's norm.

    `group`: this process's, `seeds`: of their forward passes. A step whose gradient is not finite changes nothing.
    """
    optimizer.zero_grad(set_to_none=True)
    objectives, world = passes.task.objectives, passes.world
    totals = world.sum([sum(o.share(batch) for batch in group) for o in objectives])
    each: dict[str, float] = {}
    routings = []
    whole = pooled(passes, group, seeds)
    for i, (batch, seed) in enumerate(zip(group, seeds, strict=True)):
        shares = {o.name: o.share(batch) / total if total else 0.0 for o, total in zip(objectives, totals, strict=True)}
        torch.manual_seed(seed)
        losses = passes(batch, shares, None if whole is None else whole.pulls[i], last=i + 1 == len(group))
        routings.append(losses.routings)
        shares[BALANCE] = shares.get(Lm.name, 0.0)
        for name, loss in losses.each.items():
            each[name] = each.get(name, 0.0) + shares[name] * float(loss)
    if whole is not None:
        each[Itc.name] = whole.loss()
    each = dict(zip(each, world.sum(list(each.values())), strict=True))
    norm = gradient_norm(passes.task, clip)
    if math.isfinite(norm):
        optimizer.step()
        if health is not None:
            health.step(routings, world)
    return each, norm


def gradient_norm(task: nn.Module, clip: float | None) -> float:
    """The norm of all gradients, before it is clipped to `clip`."""
    learning = [parameter for parameter in task.parameters() if parameter.requires_grad]
    norm: Tensor = nn.utils.clip_grad_norm_(learning, math.inf if clip is None else clip)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
