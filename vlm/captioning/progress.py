"""What people see on standard error: a line for each picture that failed, a bar on a terminal, the count at the end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn


class Meter:
    """Counts pictures, and tells of them unless `quiet`."""

    def __init__(self, quiet: bool, bar: bool) -> None:
        """`bar`: to show how it goes, if standard error is a terminal."""
        self.done = self.failed = self.skipped = 0
        self._quiet, self._began = quiet, time.monotonic()
        console = Console(stderr=True, highlight=False)
        columns = SpinnerColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console) if bar and not quiet and console.is_terminal else None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar, while the work goes on."""
        if self._bar is None:
            yield
            return
        with self._bar:
            self._task = self._bar.add_task("", total=None)
            yield

    def count(self, done: int = 0, failed: int = 0) -> None:
        """More pictures."""
        self.done += done
        self.failed += failed
        if self._bar is not None:
            rate = self.done / max(1e-9, time.monotonic() - self._began)
            kept = f", {self.skipped} were done" if self.skipped else ""
            bad = f", {self.failed} failed" if self.failed else ""
            self._bar.update(self._task, description=f"{self.done} captioned{kept}{bad}, {rate:.1f} a second")

    def say(self, text: str) -> None:
        """One line for people, above the bar if there is one."""
        if self._quiet:
            return
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)  # names may be anything
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """The count, if some failed, also when quiet."""
        if self.failed:
            every = self.done + self.failed
            print(f"vlm: {self.failed} of {every} pictures could not be captioned", file=sys.stderr, flush=True)
