"""`vlm train`: from a configuration to a trained run folder."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from vlm import build, build_data, checkpoint
from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.config.language import MoeFfn, TransformerLanguage
from vlm.config.load import ConfigError, load
from vlm.data.batch import Batch
from vlm.data.text import Tokenizer, load_tokenizer
from vlm.model.language import Decoder
from vlm.model.vlm import VisionLanguageModel
from vlm.restore import TOKENIZER, initialise, relative_init, sourced_parts
from vlm.train.alike import Speech
from vlm.train.average import Average
from vlm.train.experts import Health, experts_of
from vlm.train.feed import Feed, Train, begun, feed
from vlm.train.flops import flops_per_sample
from vlm.train.folder import Resume, check_folder, prepare
from vlm.train.lock import locked
from vlm.train.log import Log, Quiet, check_reports, note
from vlm.train.loop import Plan, Progress, fit
from vlm.train.optim import Line, Rule, Schedule, assign, make_optimizer, table
from vlm.train.parallel import Passes, Replicas, Shards, compile_layers, recompute
from vlm.train.signals import Interrupted, leave
from vlm.train.speed import flops_per_token, peak_flops
from vlm.train.task import Itc, Itm, Lm, Objective, Task
from vlm.train.validate import Once, validate
from vlm.world import World, exchanging, joined, started


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
    check_reports(run.train.report_to)
    check_processes(run.train, started())
    with ExitStack() as stack:
        if int(os.environ.get("RANK", "0")) == 0:  # before the processes meet: what is refused here is said once
            check_folder(out, run, resume, overwrite)
            stack.enter_context(locked(out))
        else:
            logging.getLogger("vlm").setLevel(logging.ERROR)  # warnings are the first process's to say
        world = stack.enter_context(joined(run.train.timeout))
        go_on = bool(world.most(int(world.first and check_folder(out, run, resume, overwrite))))
        with exchanging():
            _train(run, out, go_on, title, later, world)


def _train(run: schema.Run, out: Path, resume: bool, title: str, later: float, world: World) -> None:
    data = feed(run)
    tokenizer = load_tokenizer(out / TOKENIZER) if resume else _tokenizer(run, data, world)
    job = Job(run, out, data, tokenizer, resume, world)
    world.first_does(lambda: prepare(out, run, tokenizer, fresh=not resume))
    try:
        job.fit(title, later)
    except Interrupted as stop:
        note(
            f"{title}: stopped and saved at step {stop.step}; go on with: vlm train {out / CONFIG} --out {out} --resume"
        )
        raise leave(stop.number) from None
    if bad := job.bad():
        note("unusable samples: " + ", ".join(f"{count} x {reason}" for reason, count in bad.most_common()))


def check_processes(train: schema.Train, count: int) -> None:
    """Errors: settings that do not go with so many processes, all at once."""
    problems = []
    if train.accumulate % count:
        problems.append(
            f"train.accumulate={train.accumulate}: {count} processes share the forward passes of a step, so it must be "
            f"a multiple of {count}; a step is batch_size x accumulate samples, however many processes there are"
        )
    if count > 1 and train.parallel != "ddp" and any(group.muon is not None for group in train.params):
        problems.append(f"train.parallel={train.parallel}: Muon needs whole matrices; take ddp, or AdamW alone")
    if problems:
        raise ConfigError(problems)


def _tokenizer(run: schema.Run, data: Feed, world: World) -> Tokenizer:
    """Learned by one process, if it is to be learned, and equal in all."""
    own = build_data.tokenizer(run.tokenizer, data.captions()) if world.first else None
    if world.size == 1:
        assert own is not None
        return own
    return Tokenizer.from_text(world.texts("" if own is None else own.to_text())[0])


class Job:
    """Everything a run needs in order to train, made and checked before its folder is touched."""

    def __init__(
        self,
        run: schema.Run,
        out: Path,
        data: Feed,
        tokenizer: Tokenizer,
        resume: bool,
        world: World,
        scratch: Path | None = None,
    ) -> None:
        """`scratch`: for what is made of the data, in place of the run's folder.

        Errors: parts that do not fit, patterns that match nothing, unusable data, a checkpoint of other settings.
        """
        self.run, self.out, self.data, self.tokenizer, self.world = run, out, data, tokenizer, world
        self.precision = build.precision(run, world.device)
        model = build.model(run, tokenizer)
        for line in initialise(model, run, out):
            note(line)
        decided = assign(model, rules(run), frozen_parts(run))
        note(render(table(model, decided)))
        self.stored = checkpoint.divide(model, sourced_parts(run))
        self.start, self.best, self.progress = 0, math.inf, Progress()
        self.pending: dict[str, Any] | None = None
        self.health = Health(experts_of(model), bias_rate(run))
        saved = self._weights(model) if resume else None
        train, self.once = self._open(model, scratch or out)
        self.batches = begun(train(numbers(self.start, run.train.accumulate, world)))
        objectives = [objective(loss, tokenizer, run.train.accumulate) for loss in run.losses]
        task = Task(model.to(world.device), objectives)
        self.seconds = self._sample_seconds(task), self._token_seconds(task)
        self.passes = self._spread(task)
        self.optimizer = make_optimizer(model, decided, run.train.betas, run.train.eps)
        self.average = None if run.train.ema is None else Average(model, run.train.ema)
        if saved is not None:
            checkpoint.load_optimizer(saved, model, self.optimizer)
            if self.average is not None:
                self.average.load(saved / checkpoint.AVERAGE)

    def bad(self) -> Counter[str]:
        """Unusable samples of all processes, by reason; all must ask."""
        met = [Counter(json.loads(text)) for text in self.world.texts(json.dumps(self.data.bad()))]
        return sum(met, Counter(self.data.left_out()))

    def fit(self, title: str, later: float) -> None:
        """Trains to the end. Errors: see `vlm.train.loop.fit`."""
        self.log = self._log(title, later) if self.world.first else Quiet()
        said = speech(self.run, self.tokenizer)
        with self.log:
            fit(
                self.passes,
                self.batches,
                self.optimizer,
                plan(self.run.train),
                self.log,
                self._save,
                None if self.once is None else partial(validate, self.passes, self.once, said),
                self.average,
                self.start,
                self.health,
                self.best,
                self.progress,
            )

    def _log(self, title: str, later: float) -> Log:
        train, texts = self.run.train, self.data.texts
        return Log(
            self.out,
            train.steps,
            title,
            train.log_every,
            {o.name: o.chance(train.batch_size, texts) for o in self.passes.task.objectives},
            self.start,
            train.report_to,
            later,
            self.health,
            self.seconds[1],
            self.pending,
            self.seconds[0],
        )

    def _save(self, step: int, lowest: float, best: bool) -> None:
        extra = {
            "bad": dict(self.bad()),
            "lowest": lowest if math.isfinite(lowest) else None,
            "progress": asdict(self.progress),
            "log": self.log.pending(),
            "experts": self.health.pending(),
        }
        averaged = None if self.average is None else self.average.tensors
        model, keep = self.passes.task.model, self.run.train.keep
        checkpoint.save(self.out, step, model, self.stored, self.optimizer, self.world, averaged, keep, extra, best)

    def _weights(self, model: VisionLanguageModel) -> Path:
        """Takes up what a checkpoint holds but the optimizer's memory, which needs an optimizer first."""
        chosen = checkpoint.whole(self.out)
        self.start = checkpoint.load_weights(chosen, model, sourced_parts(self.run), averaged=False)
        state = checkpoint.read_state(chosen)
        self.best = math.inf if state["lowest"] is None else state["lowest"]
        self.progress, self.pending = Progress(**state["progress"]), state["log"]
        self.health.take_up(state["experts"])
        note(f"resuming {self.out} at step {self.start}")
        return chosen

    def _open(self, model: VisionLanguageModel, folder: Path) -> tuple[Train, Once | None]:
        with self.world.in_turn():  # text is packed by the first process
            return self.data.open(model, self.tokenizer, folder)

    def _spread(self, task: Task) -> Passes:
        """The passes of a step as the settings want them."""
        train, world = self.run.train, self.world
        if train.activation_checkpointing:
            recompute(task.model)
        if train.compile:
            compile_layers(task.model)
        if world.size == 1:
            return Passes(task, self.precision, world)
        if train.parallel == "ddp":
            return Replicas(task, self.precision, world, self._first())
        return Shards(task, self.precision, world, train.parallel)

    def _first(self) -> Batch:
        batch = next(self.batches)
        self.batches = chain([batch], self.batches)
        return batch

    def _sample_seconds(self, task: Task) -> float | None:
        """What a picture with its text takes at the peak of all devices, by the first batch; None for text alone."""
        first = self._first()
        if first.images is None:
            return None
        flops = flops_per_sample(task.train(), first.to(self.world.device), self.precision)
        return None if flops is None else flops / self._peak()

    def _token_seconds(self, task: Task) -> float | None:
        """What a token takes at the peak of all devices; None with pictures, whose cost is counted by the sample."""
        language = task.model.language
        if not isinstance(self.run.data, schema.TextData) or not isinstance(language, Decoder):
            return None
        return flops_per_token(language, self.run.data.length) / self._peak()

    def _peak(self) -> float:
        return peak_flops(self.world.device, self.precision) * self.world.size


def numbers(start: int, lanes: int, world: World) -> Iterator[int]:
    """The numbers in the stream of this process's batches, from step `start` on."""
    return (step * lanes + lane for step in count(start) for lane in world.share(lanes))


def bias_rate(run: schema.Run) -> float | None:
    """Step of the experts' selection bias, if that is what balances them."""
    language = run.model.language
    if not isinstance(language, TransformerLanguage) or not isinstance(language.ffn, MoeFfn):
        return None
    return language.ffn.bias_rate


def objective(settings: schema.Loss, tokenizer: Tokenizer, accumulate: int = 1) -> Objective:
    """The objective of a loss in the settings; `accumulate`: forward passes per step."""
    match settings:
        case schema.ItcLoss():
            return Itc(settings.weight, settings.label_smoothing, accumulate if settings.over == "step" else 1)
        case schema.ItmLoss():
            return Itm(settings.weight, settings.label_smoothing)
        case schema.LmLoss():
            return Lm(tokenizer.size, tokenizer.dec, settings.weight, settings.label_smoothing)


def speech(run: schema.Run, tokenizer: Tokenizer) -> Speech | None:
    """How the model writes captions; None where it learns to write none."""
    if not isinstance(run.data, schema.PairData) or not any(isinstance(loss, schema.LmLoss) for loss in run.losses):
        return None
    return Speech(tokenizer, build_data.template(run.data.template), run.data.max_tokens)


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
        Schedule(train.warmup, train.final_lr, train.schedule, train.drops),
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
