"""A bar on standard error while something takes long, on a terminal only."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as follow

T = TypeVar("T")


def track(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The items as they are; `total`: how many there will be."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return iter(items)
    return iter(follow(items, title, total, console=console, transient=True))
