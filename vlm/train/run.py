"""`vlm train`: from a configuration to a trained run folder."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from vlm import build, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.load import dump, load
from vlm.data.batch import Batch
from vlm.data.loader import Loader
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.nn.backend import best_device, fast_float32
from vlm.restore import TOKENIZER, initialise, relative_init, sourced_parts
from vlm.train.average import Average
from vlm.train.log import BOARD, METRICS, Log, check_reports, note
from vlm.train.loop import Interrupted, Plan, autocast, fit
from vlm.train.optim import Line, Rule, assign, make_optimizer, table
from vlm.train.task import Itc, Itm, Lm, Objective, Task


def train(config: Path, overrides: Sequence[str], out: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Trains what `config` describes into the folder `out`.

    Errors: mistakes in the settings (all at once), unusable data, a folder that holds another run.
    """
    run = load(schema.Run, config, overrides)
    train_run(run, out, resume, overwrite)


def train_run(
    run: schema.Run,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    title: str = "train",
    later: float = 0.0,
) -> None:
    """As `train`, from settings that are checked already; `later` as in `Log`."""
    run = relative_init(run, out)
    check_folder(out, run, resume, overwrite)
    check_reports(run.train.report_to)
    device = best_device()
    source = build.shards(run.data, run.data.train)
    tokenizer = _tokenizer(run, out, resume, source.captions)
    model = build.model(run, tokenizer)
    for line in initialise(model, run, out):
        note(line)
    decided = assign(model, rules(run), frozen_parts(run))
    note(render(table(model, decided)))
    stored = checkpoint.divide(model, sourced_parts(run))
    model.to(device)
    precision = build.precision(run, device)
    objectives = [objective(loss, tokenizer) for loss in run.losses]
    task = Task(model, objectives)
    optimizer = make_optimizer(model, decided, run.train.betas)
    average = None if run.train.ema is None else Average(model, run.train.ema)
    start = _resume(out, model, sourced_parts(run), optimizer, average) if resume else 0
    loader = build.training_loader(run, source, model.vision.transform, tokenizer, model.image_tokens)
    check = _validation(run, task, tokenizer, precision)
    batches = _begun(loader.train(start * run.train.accumulate))
    _prepare(out, run, tokenizer, fresh=not resume)

    def unusable() -> Counter[str]:
        return source.bad + loader.bad

    def save(step: int) -> None:
        averaged = None if average is None else average.tensors
        checkpoint.save(out, step, model, stored, optimizer, averaged, run.train.keep, {"bad": dict(unusable())})

    chance = {
        o.name: o.chance(run.train.batch_size, run.train.batch_size * run.data.captions_per_image) for o in objectives
    }
    try:
        with Log(out, run.train.steps, title, run.train.log_every, chance, start, run.train.report_to, later) as log:
            fit(task, batches, optimizer, plan(run.train), log, precision, save, check, average, start)
    except Interrupted as stop:
        note(
            f"{title}: stopped and saved at step {stop.step}; go on with: vlm train {out / CONFIG} --out {out} --resume"
        )
        raise KeyboardInterrupt from None
    if bad := unusable():
        note("unusable samples: " + ", ".join(f"{count} x {reason}" for reason, count in bad.most_common()))


def check_folder(out: Path, run: schema.Run, resume: bool, overwrite: bool) -> None:
    """Refuses a folder that holds another run, and a resume that would change the settings. Changes nothing."""
    held = out / CONFIG
    if resume:
        if not held.is_file():
            raise ValueError(f"--resume: {out} holds no run (no {CONFIG})")
        if dump(load(schema.Run, held)) != dump(run):
            raise ValueError(
                f"--resume: the settings differ from {held}; resume with that file, or start another folder"
            )
        checkpoint.latest(out)
    elif held.is_file() and not overwrite:
        raise ValueError(f"{out} holds a run already: choose another --out, --resume it, or --overwrite it")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file")


def objective(settings: schema.Loss, tokenizer: Tokenizer) -> Objective:
    """The objective of a loss in the settings."""
    match settings:
        case schema.ItcLoss():
            return Itc(settings.weight, settings.label_smoothing)
        case schema.ItmLoss():
            return Itm(settings.weight, settings.label_smoothing)
        case schema.LmLoss():
            return Lm(tokenizer.size, tokenizer.dec, settings.weight, settings.label_smoothing)


def render(lines: Sequence[Line]) -> str:
    """The table of what trains, as text."""
    rows = [("part", "pattern", "rate", "tensors", "parameters")]
    for line in lines:
        rate = "frozen" if line.lr is None else f"{line.lr:g}"
        rows.append((line.part, line.match, rate, str(line.tensors), f"{line.parameters:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plan(train: schema.Train) -> Plan:
    """The settings that the loop needs."""
    return Plan(
        train.steps,
        train.accumulate,
        train.warmup,
        train.final_lr,
        train.clip,
        train.seed,
        train.eval_every,
        train.save_every,
    )


def rules(run: schema.Run) -> list[Rule]:
    """The settings' patterns with their defaults filled in."""
    decay = run.train.weight_decay
    return [Rule(g.match, g.lr, decay if g.weight_decay is None else g.weight_decay, g.muon) for g in run.train.params]


def frozen_parts(run: schema.Run) -> list[str]:
    """Parts frozen by a setting of their own."""
    return ["vision"] if run.model.vision.frozen else []


def validate(task: Task, loader: Loader, precision: torch.dtype) -> dict[str, float]:
    """Mean losses over a data set, each sample once."""
    device = next(task.parameters()).device
    sums: dict[str, float] = {}
    shares: dict[str, float] = {}
    task.eval()
    torch.manual_seed(0)
    with torch.no_grad(), fast_float32():
        for batch in loader.once():
            batch = batch.to(device)
            with autocast(device, precision):
                losses = task(batch)
            for o in task.objectives:
                share = o.share(batch)
                sums[o.name] = sums.get(o.name, 0.0) + share * float(losses.each[o.name])
                shares[o.name] = shares.get(o.name, 0.0) + share
    return {f"val/loss_{name}": total / max(1.0, shares[name]) for name, total in sums.items()}


def _validation(
    run: schema.Run, task: Task, tokenizer: Tokenizer, precision: torch.dtype
) -> Callable[[], dict[str, float]] | None:
    if run.data.val is None:
        return None
    source = build.shards(run.data, run.data.val)
    model = task.model
    loader = build.evaluation_loader(run, source, model.vision.transform, tokenizer, model.image_tokens)
    return lambda: validate(task, loader, precision)


def _tokenizer(run: schema.Run, out: Path, resume: bool, captions: Callable[[], Iterable[str]]) -> Tokenizer:
    if resume:
        return load_tokenizer(out / TOKENIZER)
    return build.tokenizer(run.tokenizer, captions())


def _resume(
    out: Path,
    model: torch.nn.Module,
    sourced: set[str],
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> int:
    newest = checkpoint.latest(out)
    step = checkpoint.load_weights(newest, model, sourced, averaged=False)
    checkpoint.load_optimizer(newest, model, optimizer)
    if average is not None:
        average.load(newest / "average.safetensors")
    note(f"resuming {out} at step {step}")
    return step


def _begun(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches with the first one made: most of what can be wrong with data shows before a run exists."""
    return chain([next(batches)], batches)


def _prepare(out: Path, run: schema.Run, tokenizer: Tokenizer, fresh: bool) -> None:
    if fresh and (out / CONFIG).is_file():  # a folder that holds no run is nobody's to clear
        for old in checkpoint.checkpoints(out):
            shutil.rmtree(old)
        shutil.rmtree(out / BOARD, ignore_errors=True)
        for name in (METRICS, checkpoint.LATEST):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / TOKENIZER)
    (out / CONFIG).write_text(dump(run), encoding="utf-8")
