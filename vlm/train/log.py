"""What a run tells: a progress bar on a terminal or plain lines, metrics.jsonl always, TensorBoard on request."""

import json
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vlm.train.alike import SAID, TRUE, monotone
from vlm.train.experts import Health
from vlm.train.validate import GAP, blind

METRICS, BOARD = "metrics.jsonl", "tensorboard"


class Log:
    """Collects the losses of each step and reports their means every few steps."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        title: str,
        every: int,
        chance: Mapping[str, float],
        start: int = 0,
        report_to: Sequence[str] = (),
        later: float = 0.0,
        health: Health | None = None,
        token_seconds: float | None = None,
        pending: Mapping[str, Any] | None = None,
        sample_seconds: float | None = None,
    ) -> None:
        """`chance`: of each loss, what guessing gives; `start`: the step a resumed run goes on from.

        `later`: work that follows this run, as a multiple of it, to say how long is left in all. `health`: of mixtures
        of experts. `token_seconds`, `sample_seconds`: what one takes at the machine's peak, to tell the utilisation
        (MFU). `pending`: from the `pending()` of an earlier part of the run.
        """
        self.steps, self.every, self.chance, self.title = steps, every, chance, title
        self.console = Console(stderr=True, highlight=False)
        pending = pending or {"sums": {}, "count": 0}
        self._sums: dict[str, float] = defaultdict(float, pending["sums"])
        self._waited, self._steps = 0.0, 0
        self._count: int = pending["count"]
        self._since, self._began, self._start = time.perf_counter(), time.perf_counter(), start
        self._stuck: set[str] = set()
        self._later, self._health = later, health
        self._peak_seconds = {"tokens": token_seconds, "samples": sample_seconds}
        self._counts: dict[str, float] = defaultdict(float)
        cut_after(folder / METRICS, start)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(folder) if "tensorboard" in report_to else None
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> "Log":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.steps, completed=self._start, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def pending(self) -> dict[str, Any]:
        """What the next report will tell of steps that are done: saved with them, the log of a resumed run is equal."""
        return {"sums": dict(self._sums), "count": self._count}

    def step(
        self,
        done: int,
        losses: Mapping[str, float],
        facts: Mapping[str, float],
        counts: Mapping[str, float],
        waited: float = 0.0,
    ) -> None:
        """After each step: losses, facts of which the newest are told (rate), counts that are told per second.

        `waited`: seconds until the data was there.
        """
        for name, value in losses.items():
            self._sums[name] += value
        for name, value in counts.items():
            self._counts[name] += value
        self._count += 1
        self._steps += 1
        self._waited += waited
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        if done % self.every == 0 or done == self.steps:
            self._report(done, facts)

    def event(self, done: int, values: Mapping[str, float]) -> None:
        """Something measured now and then, such as a validation."""
        self._write(done, values)
        self.say(f"{self.title} {done}/{self.steps}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if not self._late(done):
            return
        look = "Look at pictures and captions, at whether the connector learns, and at its rate."
        if GAP in values and blind(values[GAP], values["val/loss_lm"]):
            self._once(
                GAP,
                f"warning: after {done} steps the lm loss is the same with the wrong pictures (vision gap "
                f"{values[GAP]:.4f}): the model writes without looking. {look}",
            )
        if SAID in values and monotone(values[SAID], values[TRUE]):
            self._once(
                SAID,
                f"warning: after {done} steps {values[SAID]:.0%} of the captions are the same, of the true ones "
                f"{values[TRUE]:.0%}: the model says one thing of every picture. {look}",
            )

    def say(self, text: str) -> None:
        """One line for people, above the bar if there is one."""
        self.console.print(text, markup=False, soft_wrap=True)

    def _once(self, about: str, warning: str) -> None:
        if about not in self._stuck:
            self._stuck.add(about)
            self.say(warning)

    def _report(self, done: int, facts: Mapping[str, float]) -> None:
        now = time.perf_counter()
        means = {name: total / self._count for name, total in self._sums.items()}
        speed = {name: value / (now - self._since) for name, value in self._counts.items()}
        values: dict[str, float | list[float]] = {f"train/loss_{name}": value for name, value in means.items()}
        values |= {f"chance/loss_{name}": self.chance[name] for name in means if name in self.chance}
        values |= {f"train/{name}": value for name, value in facts.items()}
        values |= {f"train/{name}_per_second": value for name, value in speed.items()}
        values |= self._times(now)
        if (used := self._utilisation(speed)) is not None:
            values["train/mfu"] = used
        values |= self._experts()
        self._write(done, values)
        note = "  ".join(_beside_chance(name, value, self.chance.get(name)) for name, value in means.items())
        pace = (now - self._began) / max(1, done - self._start)
        left = clock(pace * (self.steps - done))
        if self._later:
            left += f" ({clock(pace * (self.steps * (1 + self._later) - done))} in all)"
        if self._bar is not None:
            self._bar.update(self._task, note=f"{note}  {left} left")
        else:
            self.say(f"{self.title} {done}/{self.steps}  {note}  {self._pace(speed)}  {left} left")
        self._warn(done, means)
        self._sums.clear()
        self._counts.clear()
        self._count, self._steps, self._waited, self._since = 0, 0, 0.0, now

    def _times(self, now: float) -> dict[str, float]:
        """Seconds a step spent on waiting for data and on computing, and the memory."""
        data, whole = self._waited / self._steps, (now - self._since) / self._steps
        return {
            "train/data_seconds": data,
            "train/compute_seconds": whole - data,
            "train/data_share": data / whole if whole else 0.0,
            "train/peak_memory_mb": peak_memory() / 2**20,
            "seconds": now - self._began,
        }

    def _late(self, done: int) -> bool:
        """Whether something should have been learned by now."""
        return done >= max(200, self.steps // 5)

    def _utilisation(self, speed: Mapping[str, float]) -> float | None:
        known = [speed[name] * cost for name, cost in self._peak_seconds.items() if cost is not None and name in speed]
        return known[0] if known else None

    def _pace(self, speed: Mapping[str, float]) -> str:
        used = self._utilisation(speed)
        unit = "samples" if self._peak_seconds["tokens"] is None else "tokens"
        share = self._waited / max(1e-9, time.perf_counter() - self._since)
        parts = [f"{speed.get(unit, 0):.0f} {unit}/s"]
        parts += [] if used is None else [f"MFU {100 * used:.0f} %"]
        return "  ".join(parts + ([f"waits for data {share:.0%}"] if share >= 0.1 else []))

    def _experts(self) -> Mapping[str, float | list[float]]:
        report = None if self._health is None else self._health.report()
        if report is None:
            return {}
        if warning := report.warning():
            self._once(warning, warning)
        return report.values()

    def _warn(self, done: int, means: Mapping[str, float]) -> None:
        for name, value in means.items():
            level = self.chance.get(name)
            if level is None or not self._late(done) or value < 0.97 * level:
                continue
            self._once(
                name,
                f"warning: after {done} steps the {name} loss is {value:.3f}, and guessing gives {level:.3f}: nothing "
                "has been learned from it yet. Look at the pictures and captions, at what learns, and at the rate.",
            )

    def _write(self, done: int, values: Mapping[str, float | list[float]]) -> None:
        plain = {k: [_plain(x) for x in v] if isinstance(v, list) else _plain(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": done, **plain}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if not isinstance(value, list):
                    self._board.add_scalar(name, value, done)


class Quiet:
    """The log of a process that leaves telling to another."""

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def pending(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def step(self, done: int, *told: Any) -> None:
        """Tells nothing."""

    def event(self, done: int, values: Mapping[str, float]) -> None:
        """Tells nothing."""

    def say(self, text: str) -> None:
        """Tells nothing."""


def _beside_chance(name: str, value: float, level: float | None) -> str:
    return f"{name} {value:.3f}" + ("" if level is None else f" (chance {level:.3f})")


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or that the process had resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _plain(value: float) -> float | None:
    """JSON knows no NaN and no infinity: null."""
    return round(float(value), 6) if math.isfinite(value) else None


def cut_after(path: Path, step: int) -> None:
    """Drops what a killed run logged after its checkpoint, and a line that it did not finish."""
    if not path.is_file():
        return
    whole = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():  # a lost power supply leaves anything
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step", 0) <= step:
            whole.append(line)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    draft.replace(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All numbers of a run, in order; what was not finite is NaN again, and lists are left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {
            key: math.nan if value is None else float(value)
            for key, value in record.items()
            if not isinstance(value, list)
        }
        for record in records
    ]


def check_reports(report_to: Sequence[str]) -> None:
    """Errors: a place to report to whose package is not installed."""
    if "tensorboard" in report_to and find_spec("tensorboard") is None:
        raise ValueError("train.report_to: tensorboard is not installed: pip install 'vlm[tensorboard]'")


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / BOARD))


def note(text: str) -> None:
    """One line for people, on stderr; of several processes (torchrun) the first says it for all."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
