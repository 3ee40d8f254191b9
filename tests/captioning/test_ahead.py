"""Items are prepared by threads: in order, within a window, as they are ready."""

import threading
from collections.abc import Iterator

import pytest

from vlm.captioning import ahead as ahead_module
from vlm.captioning.ahead import Ahead


def every(ahead: Ahead[int, int], most: int) -> list[list[int]]:
    found = []
    while taken := ahead.take(most):
        found.append([result for _, result in taken])
    return found


def test_in_order_whatever_is_ready_first() -> None:
    second_is_done = threading.Event()

    def prepare(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(60)
        if item == 1:
            second_is_done.set()
        return item * item

    ahead = Ahead(range(10), prepare, workers=2, window=4)
    assert every(ahead, 3) == [[0, 1, 4], [9, 16, 25], [36, 49, 64], [81]]
    assert ahead.take(3) == []
    ahead.close()


def test_no_more_than_the_window_is_asked_for() -> None:
    asked, full = list[int](), threading.Event()

    def items() -> Iterator[int]:
        for i in range(1_000_000):
            asked.append(i)
            if len(asked) == 6:
                full.set()
            yield i

    ahead = Ahead(items(), lambda item: item, workers=2, window=5)
    assert full.wait(60)
    assert len(ahead.take(1)) == 1
    assert len(asked) <= 5 + 2
    ahead.close()


def test_a_batch_does_not_wait_for_what_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "PATIENCE", 0.05)
    go_on = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        yield 1
        assert go_on.wait(60)
        yield 2

    ahead = Ahead(items(), lambda item: item, workers=1, window=8)
    assert [item for item, _ in ahead.take(8)] == [0, 1]
    go_on.set()
    assert every(ahead, 8) == [[2]]
    ahead.close()


def test_nor_for_what_is_slow_to_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "PATIENCE", 0.05)
    go_on = threading.Event()

    def prepare(item: int) -> int:
        assert item != 1 or go_on.wait(60)
        return item

    ahead = Ahead(range(3), prepare, workers=2, window=8)
    assert [item for item, _ in ahead.take(8)] == [0]
    go_on.set()
    assert [item for row in every(ahead, 8) for item in row] == [1, 2]
    ahead.close()


def test_errors_of_the_items_come_after_what_was_before_them() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("no list")

    ahead = Ahead(items(), lambda item: item, workers=1, window=8)
    assert ahead.take(8) == [(0, 0)]
    with pytest.raises(ValueError, match="no list"):
        ahead.take(8)
    ahead.close()


def test_nothing_reads_on_when_it_is_closed() -> None:
    """A thread of torch's cut off by the end of the interpreter aborts the process: `vlm caption … | head` did."""
    ahead = Ahead(range(1_000_000), lambda item: item, workers=1, window=4)
    assert ahead.take(1) == [(0, 0)]
    ahead.close()
    assert "read" not in [thread.name for thread in threading.enumerate()]
