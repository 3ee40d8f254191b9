"""`vlm doctor`: looks, measures, advises; each part is printed as soon as it is known."""

import json as jsonlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm import __version__
from vlm.doctor.advice import advise
from vlm.doctor.facts import Facts, Package, Rate
from vlm.doctor.machine import look
from vlm.doctor.packages import asked, conflicts, core, extras
from vlm.doctor.variables import VARIABLES

Rows = Sequence[tuple[str, ...]]
COLOURS = {"wrong": "red", "slow": "yellow", "note": "cyan"}


def doctor(json: bool = False, quick: bool = False) -> bool:
    """Prints what was found; False if something is wrong. `quick`: nothing is measured."""
    console = Console(highlight=False)
    for title, facts in _parts(quick):
        if not json:
            _show(console, title, PARTS[title](facts))
    advice = advise(facts)
    healthy = not any(one.level == "wrong" for one in advice)
    if json:
        found = {**asdict(facts), "advice": [asdict(one) for one in advice], "healthy": healthy}
        print(jsonlib.dumps(found, indent=1, ensure_ascii=False), flush=True)
        return healthy
    _show(console, "advice", [(one.level, f"{one.what} → {one.remedy}") for one in advice])
    wrong = sum(one.level == "wrong" for one in advice)
    slow = sum(one.level == "slow" for one in advice)
    print(_verdict(wrong, slow), flush=True)
    return healthy


def _verdict(wrong: int, slow: int) -> str:
    if wrong:
        return f"{wrong} wrong, {slow} slow"
    return f"healthy; {slow} slower than it could be" if slow else "healthy"


def _parts(quick: bool) -> Iterator[tuple[str, Facts]]:
    """The facts as they grow, with the name of what is new."""
    facts = gather()
    yield "versions", facts
    yield "extras", facts
    from vlm.doctor.devices import with_devices

    facts = with_devices(facts)
    yield "devices", facts
    if facts.torch is not None and not quick:
        facts = _measured(facts)
        yield "rates", facts
    yield "environment", facts


def gather() -> Facts:
    """What needs no torch: in a moment."""
    requirements = asked("vlm")
    needed = core(requirements or ())
    return Facts(
        vlm=__version__,
        python=platform.python_version(),
        described=requirements is not None,
        packages=needed,
        conflicts=conflicts([one.name for one in needed] + ["transformers", "peft"]),
        extras=extras(requirements or ()),
        machine=look(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _measured(facts: Facts) -> Facts:
    import torch

    from vlm.doctor.measure import decoding, products
    from vlm.nn.backend import best_device

    cpu, best = torch.device("cpu"), best_device()
    console = Console(stderr=True)
    with console.status("measuring", refresh_per_second=1) if console.is_terminal else nullcontext():
        rates = [*products(cpu), *(products(best) if best.type != "cpu" else ())]
        usable = facts.pictures is not None and facts.pictures.jpeg
        return replace(facts, rates=tuple(rates), decoding=decoding() if usable else None)


def versions(facts: Facts) -> Rows:
    """Package, version, what is asked for."""
    first = [("vlm", facts.vlm, ""), ("python", facts.python, ""), ("system", facts.machine.system, "")]
    return first + [_package(one) for one in facts.packages]


def _package(one: Package) -> tuple[str, str, str]:
    return one.name, one.version or "not installed", one.wanted if one.fits else f"needs {one.wanted}"


def optional(facts: Facts) -> Rows:
    """Extra, what is installed of it, what it gives and how to get it."""
    rows = []
    for extra in facts.extras:
        there = all(one.fits for one in extra.packages)
        has = ", ".join(f"{one.name} {one.version}" for one in extra.packages if one.version) or "not installed"
        if len(extra.packages) > 2:
            has = f"{sum(one.fits for one in extra.packages)} of {len(extra.packages)} packages"
        rows.append((extra.name, has, extra.gives if there else f"{extra.gives}: pip install 'vlm[{extra.name}]'"))
    return rows


def devices(facts: Facts) -> Rows:
    """CPU, memory, GPUs."""
    machine, torch = facts.machine, facts.torch
    cores = f"{machine.usable} of {machine.cores} cores usable"
    used = f", {torch.threads} thread{'s' * (torch.threads != 1)}" if torch else ""
    rows = [("CPU", f"{machine.cpu}: {cores}{used}; {', '.join(machine.instructions) or 'instructions unknown'}")]
    sizes = (("memory", machine.memory), ("/dev/shm", machine.shared))
    rows += [(name, f"{size / 2**30:.1f} GiB") for name, size in sizes if size is not None]
    if machine.open_files is not None:
        rows.append(("open files", str(machine.open_files)))
    if torch is not None:
        built = f"torch for CUDA {torch.cuda}" if torch.cuda else "torch without CUDA"
        rows.append(("CUDA", f"{built}; driver {machine.driver or 'none'}"))
        for gpu in torch.gpus:
            bf16 = "bf16" if gpu.bf16 else "no bf16"
            rows.append(("GPU", f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB, capability {gpu.capability}, {bf16}"))
        rows.append(("MPS", "there" if torch.mps else "none"))
    if facts.pictures is not None:
        turbo = facts.pictures.turbo
        rows.append(("JPEG", f"libjpeg-turbo {turbo}" if turbo else "without libjpeg-turbo"))
    return rows


def rates(facts: Facts) -> Rows:
    """Products with their ratio to fp32 of the same device and their error; pictures."""
    rows = [_rate(one, facts.rate("fp32", one.device)) for one in facts.rates]
    if facts.decoding is not None:
        found, name = facts.decoding, f"JPEG of {facts.decoding.megapixels:.0f} megapixels"
        rows.append((name, f"{found.whole:.0f} a second and core", "x 1.00", ""))
        ratio = f"x {found.scaled / found.whole:.2f}"
        rows.append((f"{name}, scaled", f"{found.scaled:.0f} a second and core", ratio, ""))
    return rows


def _rate(one: Rate, base: float | None) -> tuple[str, ...]:
    ratio = f"x {one.gflops / base:.2f}" if base else ""
    return f"{one.device} {one.kind}", f"{one.gflops:.3g} GFLOP/s", ratio, f"error {one.error:.0e}"


def environment(facts: Facts) -> Rows:
    """Variables that are read, those that are set first."""
    names = sorted(VARIABLES, key=lambda name: name not in facts.environment)
    return [(name, facts.environment.get(name, "not set"), VARIABLES[name]) for name in names]


PARTS = {"versions": versions, "extras": optional, "devices": devices, "rates": rates, "environment": environment}


def _show(console: Console, title: str, rows: Rows) -> None:
    """A table on a terminal; elsewhere a line each, unwrapped, with two spaces or more between columns."""
    if not rows:
        return
    if console.is_terminal:
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        for row in rows:
            table.add_row(Text(row[0], style=COLOURS.get(row[0], "")), *map(Text, row[1:]))
        console.print(table, "")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print(f"{title}  {line}".rstrip())
    sys.stdout.flush()
