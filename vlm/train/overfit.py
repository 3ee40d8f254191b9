"""`vlm train --overfit N`: can the model learn a handful of samples by heart? If not, something is wrong."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vlm import build_data
from vlm.config import schema
from vlm.config.load import load
from vlm.nn.backend import best_device
from vlm.restore import relative_init
from vlm.train.feed import feed
from vlm.train.log import note
from vlm.train.loop import one_step
from vlm.train.optim import Schedule, set_rate
from vlm.train.run import Job
from vlm.world import World, started

ENOUGH = 0.5  # of the loss that guessing has


def overfit(config: Path, overrides: Sequence[str], out: Path, count: int) -> bool:
    """Whether the losses of the first `count` samples fall below half of chance within `train.steps`; says so.

    No augmentation; stops as soon as it is enough; leaves nothing behind. `out`: where `model.init` is told from.
    Errors: as of `train`; fewer samples than `count`.
    """
    if started() > 1:
        raise ValueError("--overfit: one process does it; leave torchrun away")
    given = load(schema.Run, config, overrides)
    run = relative_init(_few(given, count), out)
    data = feed(run)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = build_data.tokenizer(run.tokenizer, data.captions())
        job = Job(run, out, data, tokenizer, False, World(best_device()), Path(scratch))
        learned, text = _learn(job)
    print(f"overfit: {text}")
    return learned


def _few(run: schema.Run, count: int) -> schema.Run:
    """One batch of the first samples, as they are: what validation on the training data meets first."""
    changed = {"val": run.data.train} | ({} if isinstance(run.data, schema.TextData) else {"augment": None})
    train = run.train.model_copy(update={"batch_size": count, "accumulate": 1, "ema": None})
    return run.model_copy(update={"data": run.data.model_copy(update=changed), "train": train})


def _learn(job: Job) -> tuple[bool, str]:
    settings, task = job.run.train, job.passes.task
    assert job.once is not None
    batch = next(job.once(0, 1)).to(job.world.device)
    chance = {o.name: o.chance(batch.size, len(batch.owner)) for o in task.objectives}
    weight = {o.name: o.weight for o in task.objectives}
    enough = ENOUGH * sum(weight[name] * value for name, value in chance.items())
    rates = Schedule(settings.warmup, curve="constant")
    task.train()
    said = ""
    for step in range(settings.steps):
        set_rate(job.optimizer, rates(step, settings.steps))
        losses, _ = one_step(job.passes, [batch], [step], job.optimizer, settings.clip, job.health)
        told = "  ".join(f"{name} {losses[name]:.3f} (chance {value:.3f})" for name, value in chance.items())
        said = f"{batch.size} samples, step {step + 1}/{settings.steps}  {told}"
        if sum(weight[name] * losses[name] for name in chance) < enough:
            return True, f"{said}: below half of chance, so the model can learn from them"
        if (step + 1) % settings.log_every == 0:
            note(f"overfit: {said}")
    return False, (
        f"{said}: not below half of chance. Look at the pictures and captions, at what learns (the table above), and "
        "at the rates in train.params, or give it more train.steps"
    )
