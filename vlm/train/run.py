"""`vlm train`: from a configuration to a trained run folder."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from vlm import build, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.language import MoeFfn
from vlm.config.load import dump, load
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.nn.backend import best_device, fast_float32
from vlm.restore import TOKENIZER, initialise, relative_init, sourced_parts
from vlm.train.average import Average
from vlm.train.experts import Health, experts_of
from vlm.train.feed import Feed, Once, begun, feed
from vlm.train.log import BOARD, METRICS, Log, check_reports, note
from vlm.train.loop import Interrupted, Plan, fit
from vlm.train.optim import Line, Rule, assign, make_optimizer, table
from vlm.train.speed import flops_per_token, peak_flops
from vlm.train.task import Itc, Itm, Lm, Objective, Task, autocast


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
    data = feed(run)
    tokenizer = load_tokenizer(out / TOKENIZER) if resume else build.tokenizer(run.tokenizer, data.captions())
    job = Job(run, out, data, tokenizer, resume)
    _prepare(out, run, tokenizer, fresh=not resume)
    try:
        job.fit(title, later)
    except Interrupted as stop:
        note(
            f"{title}: stopped and saved at step {stop.step}; go on with: vlm train {out / CONFIG} --out {out} --resume"
        )
        raise KeyboardInterrupt from None
    if bad := data.bad():
        note("unusable samples: " + ", ".join(f"{count} x {reason}" for reason, count in bad.most_common()))


class Job:
    """Everything a run needs in order to train, made and checked before its folder is touched."""

    def __init__(self, run: schema.Run, out: Path, data: Feed, tokenizer: Tokenizer, resume: bool) -> None:
        """Errors: parts that do not fit, patterns that match nothing, unusable data, a checkpoint of other settings."""
        self.run, self.out, self.data, self.tokenizer = run, out, data, tokenizer
        self.device = best_device()
        self.precision = build.precision(run, self.device)
        model = build.model(run, tokenizer)
        for line in initialise(model, run, out):
            note(line)
        decided = assign(model, rules(run), frozen_parts(run))
        note(render(table(model, decided)))
        self.stored = checkpoint.divide(model, sourced_parts(run))
        self.task = Task(
            model.to(self.device), [objective(loss, tokenizer, run.train.accumulate) for loss in run.losses]
        )
        self.optimizer = make_optimizer(model, decided, run.train.betas)
        self.average = None if run.train.ema is None else Average(model, run.train.ema)
        self.health = Health(experts_of(model), bias_rate(run))
        self.start, self.best = self._resume() if resume else (0, math.inf)
        train, self.once = data.open(model, tokenizer, out)
        self.batches = begun(train(self.start * run.train.accumulate))

    def fit(self, title: str, later: float) -> None:
        """Trains to the end. Errors: see `vlm.train.loop.fit`."""
        run = self.run
        texts, batch = self.data.texts, run.train.batch_size
        chance = {o.name: o.chance(batch, texts) for o in self.task.objectives}
        log = Log(
            self.out,
            run.train.steps,
            title,
            run.train.log_every,
            chance,
            self.start,
            run.train.report_to,
            later,
            self.health,
            self._token_seconds(),
        )
        with log:
            fit(
                self.task,
                self.batches,
                self.optimizer,
                plan(run.train),
                log,
                self.precision,
                self._save,
                None if self.once is None else self._validate,
                self.average,
                self.start,
                self.health,
                self.best,
            )

    def _save(self, step: int, lowest: float, best: bool) -> None:
        averaged = None if self.average is None else self.average.tensors
        extra = {"bad": dict(self.data.bad()), "lowest": lowest if math.isfinite(lowest) else None}
        keep = self.run.train.keep
        checkpoint.save(self.out, step, self.task.model, self.stored, self.optimizer, averaged, keep, extra, best)

    def _validate(self) -> dict[str, float]:
        assert self.once is not None
        return validate(self.task, self.once, self.precision)

    def _resume(self) -> tuple[int, float]:
        newest, model = checkpoint.latest(self.out), self.task.model
        step = checkpoint.load_weights(newest, model, sourced_parts(self.run), averaged=False)
        checkpoint.load_optimizer(newest, model, self.optimizer)
        if self.average is not None:
            self.average.load(newest / "average.safetensors")
        lowest = checkpoint.read_state(newest).get("lowest")
        note(f"resuming {self.out} at step {step}")
        return step, math.inf if lowest is None else lowest

    def _token_seconds(self) -> float | None:
        """What a token takes at the peak of this machine; None with pictures, whose cost is not counted."""
        language = self.task.model.language
        if not isinstance(self.run.data, schema.TextData) or language is None:
            return None
        return flops_per_token(language, self.run.data.length) / peak_flops(self.device, self.precision)


def bias_rate(run: schema.Run) -> float | None:
    """Step of the experts' selection bias, if that is what balances them."""
    language = run.model.language
    return language.ffn.bias_rate if language is not None and isinstance(language.ffn, MoeFfn) else None


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


def objective(settings: schema.Loss, tokenizer: Tokenizer, accumulate: int = 1) -> Objective:
    """The objective of a loss in the settings; `accumulate`: forward passes per step."""
    match settings:
        case schema.ItcLoss():
            return Itc(settings.weight, settings.label_smoothing, accumulate if settings.over == "step" else 1)
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
        train.keep_best,
    )


def rules(run: schema.Run) -> list[Rule]:
    """The settings' patterns with their defaults filled in."""
    decay = run.train.weight_decay
    return [Rule(g.match, g.lr, decay if g.weight_decay is None else g.weight_decay, g.muon) for g in run.train.params]


def frozen_parts(run: schema.Run) -> list[str]:
    """Parts frozen by a setting of their own."""
    return ["vision"] if run.model.vision is not None and run.model.vision.frozen else []


def validate(task: Task, once: Once, precision: torch.dtype) -> dict[str, float]:
    """Mean losses over a data set, each sample once."""
    device = next(task.parameters()).device
    sums: dict[str, float] = {}
    shares: dict[str, float] = {}
    task.eval()
    torch.manual_seed(0)
    with torch.no_grad(), fast_float32():
        for batch in once():
            batch = batch.to(device)
            with autocast(device, precision):
                losses = task(batch)
            for o in task.objectives:
                share = o.share(batch)
                sums[o.name] = sums.get(o.name, 0.0) + share * float(losses.each[o.name])
                shares[o.name] = shares.get(o.name, 0.0) + share
    return {f"val/loss_{name}": total / max(1.0, shares[name]) for name, total in sums.items()}


def _prepare(out: Path, run: schema.Run, tokenizer: Tokenizer, fresh: bool) -> None:
    if fresh and (out / CONFIG).is_file():  # a folder that holds no run is nobody's to clear
        for old in checkpoint.checkpoints(out):
            shutil.rmtree(old)
        shutil.rmtree(out / BOARD, ignore_errors=True)
        for name in (METRICS, checkpoint.LATEST, checkpoint.BEST):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / TOKENIZER)
    (out / CONFIG).write_text(dump(run), encoding="utf-8")
