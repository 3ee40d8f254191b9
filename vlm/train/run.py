"""`vlm train`: from a configuration to a trained run folder."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from vlm import build, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.language import MoeFfn
from vlm.config.load import load
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.nn.backend import best_device
from vlm.restore import TOKENIZER, initialise, relative_init, sourced_parts
from vlm.train.average import Average
from vlm.train.experts import Health, experts_of
from vlm.train.feed import Feed, begun, feed
from vlm.train.flops import flops_per_sample
from vlm.train.folder import Resume, check_folder, prepare
from vlm.train.lock import locked
from vlm.train.log import Log, check_reports, note
from vlm.train.loop import Plan, Progress, fit
from vlm.train.optim import Line, Rule, assign, make_optimizer, table
from vlm.train.signals import Interrupted, leave
from vlm.train.speed import flops_per_token, peak_flops
from vlm.train.task import Itc, Itm, Lm, Objective, Task
from vlm.train.validate import validate


def train(config: Path, overrides: Sequence[str], out: Path, resume: Resume = False, overwrite: bool = False) -> None:
    """Trains what `config` describes into the folder `out`.

    `resume`: True goes on from a checkpoint that must be there, "auto" starts where there is none.
    Errors: mistakes in the settings (all at once), unusable data, a folder that holds another run or is in use.
    """
    run = load(schema.Run, config, overrides)
    train_run(run, out, resume, overwrite)


def train_run(
    run: schema.Run,
    out: Path,
    resume: Resume = False,
    overwrite: bool = False,
    title: str = "train",
    later: float = 0.0,
) -> None:
    """As `train`, from settings that are checked already; `later` as in `Log`."""
    run = relative_init(run, out)
    check_folder(out, run, resume, overwrite)
    check_reports(run.train.report_to)
    with locked(out):
        _train(run, out, check_folder(out, run, resume, overwrite), title, later)


def _train(run: schema.Run, out: Path, resume: bool, title: str, later: float) -> None:
    data = feed(run)
    tokenizer = load_tokenizer(out / TOKENIZER) if resume else build.tokenizer(run.tokenizer, data.captions())
    job = Job(run, out, data, tokenizer, resume)
    prepare(out, run, tokenizer, fresh=not resume)
    try:
        job.fit(title, later)
    except Interrupted as stop:
        note(
            f"{title}: stopped and saved at step {stop.step}; go on with: vlm train {out / CONFIG} --out {out} --resume"
        )
        raise leave(stop.number) from None
    if bad := data.bad():
        note("unusable samples: " + ", ".join(f"{count} x {reason}" for reason, count in bad.most_common()))


class Job:
    """Everything a run needs in order to train, made and checked before its folder is touched."""

    def __init__(
        self, run: schema.Run, out: Path, data: Feed, tokenizer: Tokenizer, resume: bool, scratch: Path | None = None
    ) -> None:
        """`scratch`: for what is made of the data, in place of the run's folder.

        Errors: parts that do not fit, patterns that match nothing, unusable data, a checkpoint of other settings.
        """
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
        self.start, self.best, self.progress = 0, math.inf, Progress()
        self.pending: dict[str, Any] | None = None
        if resume:
            self._resume()
        train, self.once = data.open(model, tokenizer, scratch or out)
        self.batches = begun(train(self.start * run.train.accumulate))

    def fit(self, title: str, later: float) -> None:
        """Trains to the end. Errors: see `vlm.train.loop.fit`."""
        run = self.run
        texts, batch = self.data.texts, run.train.batch_size
        chance = {o.name: o.chance(batch, texts) for o in self.task.objectives}
        self.log = Log(
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
            self.pending,
            self._sample_seconds(),
        )
        with self.log:
            fit(
                self.task,
                self.batches,
                self.optimizer,
                plan(run.train),
                self.log,
                self.precision,
                self._save,
                None if self.once is None else self._validate,
                self.average,
                self.start,
                self.health,
                self.best,
                self.progress,
            )

    def _save(self, step: int, lowest: float, best: bool) -> None:
        averaged = None if self.average is None else self.average.tensors
        extra = {
            "bad": dict(self.data.bad()),
            "lowest": lowest if math.isfinite(lowest) else None,
            "progress": asdict(self.progress),
            "log": self.log.pending(),
            "experts": self.health.pending(),
        }
        keep = self.run.train.keep
        checkpoint.save(self.out, step, self.task.model, self.stored, self.optimizer, averaged, keep, extra, best)

    def _validate(self) -> dict[str, float]:
        assert self.once is not None
        return validate(self.task, self.once, self.precision)

    def _resume(self) -> None:
        chosen, model = checkpoint.whole(self.out), self.task.model
        self.start = checkpoint.load_weights(chosen, model, sourced_parts(self.run), averaged=False)
        checkpoint.load_optimizer(chosen, model, self.optimizer)
        if self.average is not None:
            self.average.load(chosen / "average.safetensors")
        state = checkpoint.read_state(chosen)
        self.best = math.inf if state["lowest"] is None else state["lowest"]
        self.progress, self.pending = Progress(**state["progress"]), state["log"]
        self.health.take_up(state["experts"])
        note(f"resuming {self.out} at step {self.start}")

    def _sample_seconds(self) -> float | None:
        """What a picture with its text takes at the peak of this machine, by the first batch; None for text alone."""
        first = next(self.batches)
        self.batches = chain([first], self.batches)
        if first.images is None:
            return None
        flops = flops_per_sample(self.task.train(), first.to(self.device), self.precision)
        return None if flops is None else flops / peak_flops(self.device, self.precision)

    def _token_seconds(self) -> float | None:
        """What a token takes at the peak of this machine; None with pictures, whose cost is counted by the sample."""
        language = self.task.model.language
        if not isinstance(self.run.data, schema.TextData) or language is None:
            return None
        return flops_per_token(language, self.run.data.length) / peak_flops(self.device, self.precision)


def bias_rate(run: schema.Run) -> float | None:
    """Step of the experts' selection bias, if that is what balances them."""
    language = run.model.language
    return language.ffn.bias_rate if language is not None and isinstance(language.ffn, MoeFfn) else None


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
        train.max_bad_steps,
    )


def rules(run: schema.Run) -> list[Rule]:
    """The settings' patterns with their defaults filled in."""
    decay = run.train.weight_decay
    return [Rule(g.match, g.lr, decay if g.weight_decay is None else g.weight_decay, g.muon) for g in run.train.params]


def frozen_parts(run: schema.Run) -> list[str]:
    """Parts frozen by a setting of their own."""
    return ["vision"] if run.model.vision is not None and run.model.vision.frozen else []
