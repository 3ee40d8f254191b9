"""Ctrl-C and SIGTERM while training: noted, and obeyed between two steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # exit code, as shells and schedulers know it


class Interrupted(Exception):
    """A signal asked to stop: the current step was finished and saved."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.number = step, number


def leave(number: int) -> BaseException:
    """What to raise so that the process ends as the signal wants it: 130 after Ctrl-C, 143 after SIGTERM."""
    return SystemExit(TERMINATED) if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """Turns the first SIGINT or SIGTERM into a number to ask for (0: none), so that a step is never torn.

    The second one ends at once.
    """
    asked = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise leave(number)
        asked = number

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, where Python takes no handlers
        yield lambda: 0
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
