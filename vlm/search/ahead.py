"""Work of threads that keeps in front of who needs it, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


@contextmanager
def ahead(work: Callable[[T], U], items: Iterable[T], workers: int, most: int) -> Iterator[Iterator[U]]:
    """What `work` makes of the items, in order; at most `most` are begun or wait for their turn."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[U]] = deque()

        def results() -> Iterator[U]:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield results()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
