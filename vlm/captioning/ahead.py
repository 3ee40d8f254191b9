"""Work done by threads while the model computes: in order, and never more than a window of it ahead."""

import time
from collections.abc import Callable, Iterable
from concurrent import futures
from queue import Empty, Queue
from threading import Semaphore, Thread
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")
PATIENCE = 1.0  # seconds that a batch which could be larger waits for more


class Ahead(Generic[A, B]):
    """Items with what `prepare` makes of each, in the order in which they come.

    Items are asked for in a thread of its own, since a list on standard input may have to be waited for.
    """

    def __init__(self, items: Iterable[A], prepare: Callable[[A], B], workers: int, window: int) -> None:
        """`window`: items under way at most, beside one that is held; `prepare` tells of errors by what it gives."""
        self._items, self._prepare = items, prepare
        self._room = Semaphore(window)
        self._pool = futures.ThreadPoolExecutor(workers, "prepare")
        self._queue: Queue[tuple[A, futures.Future[B]] | None] = Queue()
        self._head: tuple[A, futures.Future[B]] | None = None
        self._ended = self._closed = False
        self._error: Exception | None = None
        # A reader that waits for standard input must not keep the process alive.
        self._reader = Thread(target=self._read, daemon=True, name="read")
        self._reader.start()

    def _read(self) -> None:
        try:
            for item in self._items:
                self._room.acquire()
                if self._closed:
                    return
                self._queue.put((item, self._pool.submit(self._prepare, item)))
        except Exception as error:  # whatever it is, `take` raises it
            self._error = error
        self._queue.put(None)

    def take(self, most: int) -> list[tuple[A, B]]:
        """The next items, as many as are ready soon, at least one; none at the end. Raises what the items raised."""
        taken: list[tuple[A, B]] = []
        late: float | None = None
        while len(taken) < most and (one := self._next(late)) is not None:
            taken.append(one)
            late = late or time.monotonic() + PATIENCE
        if not taken and self._error is not None:
            raise self._error
        return taken

    def _next(self, late: float | None) -> tuple[A, B] | None:
        """None: the end, or it is not ready by then."""
        try:
            if self._head is None and not self._ended:
                self._head = self._queue.get(timeout=_left(late))
                self._ended = self._head is None
            if self._head is None:
                return None
            item, result = self._head[0], self._head[1].result(_left(late))
        except (Empty, futures.TimeoutError):
            return None
        self._head = None
        self._room.release()
        return item, result

    def close(self) -> None:
        """Drops what is under way."""
        self._closed = True
        self._room.release()
        self._pool.shutdown(wait=False, cancel_futures=True)
        # A daemon that runs when the interpreter ends is cut off, which aborts the process where torch frees a tensor;
        # one that waits for standard input is safe.
        self._reader.join(PATIENCE)


def _left(late: float | None) -> float | None:
    return None if late is None else max(0.0, late - time.monotonic())
