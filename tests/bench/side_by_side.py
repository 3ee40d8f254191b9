"""Timing of several candidates in one process, in alternation: on a shared machine only ratios mean something."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

Candidate = Callable[[], object]


def alternate(candidates: Mapping[str, Candidate], rounds: int = 7) -> dict[str, list[float]]:
    """Process CPU seconds of each call, at one thread; every round runs all candidates, from another one on."""
    names = list(candidates)
    for name in names:
        candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            start = time.process_time()
            candidates[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def table(title: str, seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Prints medians and `time of base / time of this`; returns these ratios (median of the rounds' ratios)."""
    ratios = {
        name: statistics.median(b / t for b, t in zip(seconds[base], times, strict=True))
        for name, times in seconds.items()
    }
    print(f"\n{title} ({torch.get_num_threads()} thread, CPU time; ratio above 1: faster than {base})")
    for name, times in seconds.items():
        middle = statistics.median(times)
        spread = (max(times) - min(times)) / middle
        print(f"  {name:42s} {middle * 1e3:9.1f} ms  spread {spread:4.0%}  ratio {ratios[name]:5.2f}")
    return ratios


def switched(candidate: Candidate, context: Callable[[], AbstractContextManager[object]] = nullcontext) -> Candidate:
    """The same candidate inside a context, such as the oneDNN switch."""

    def run() -> object:
        with context():
            return candidate()

    return run


def peak_memory(candidate: Candidate) -> float:
    """MiB by which a call raises the resident memory of this process (Linux), freed memory given back before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    candidate()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
