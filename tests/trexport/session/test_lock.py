"""The lock: readers together, a writer alone, a waiting writer before new readers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from trexport.session.lock import ReadWriteLock

LONG = 5.0
"""Seconds after which a thread that should have moved on has not."""
SHORT = 0.1
"""Seconds in which a thread that must wait would have moved on."""


def started(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def until_a_writer_waits(lock: ReadWriteLock) -> None:
    end = time.monotonic() + LONG
    while not lock._waiting:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_readers_overlap() -> None:
    lock, together = ReadWriteLock(), threading.Barrier(3)

    def read() -> None:
        with lock.read():
            together.wait(LONG)  # passed only where all three are inside at once

    threads = [started(read) for _ in range(3)]
    for thread in threads:
        thread.join(LONG)
    assert not together.broken
    assert not any(thread.is_alive() for thread in threads)


def test_a_writer_is_alone() -> None:
    lock, events = ReadWriteLock(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def write() -> None:
        with lock.write():
            inside.set()
            leave.wait(LONG)
            events.append("first writer")

    def enter(kind: str) -> None:
        with lock.write() if kind == "writer" else lock.read():
            events.append(kind)

    first = started(write)
    assert inside.wait(LONG)
    others = [started(lambda: enter("writer")), started(lambda: enter("reader"))]
    time.sleep(SHORT)
    assert events == []
    leave.set()
    for thread in (first, *others):
        thread.join(LONG)
    assert events[0] == "first writer"
    assert sorted(events[1:]) == ["reader", "writer"]


def test_a_waiting_writer_goes_before_new_readers() -> None:
    lock, events = ReadWriteLock(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def old_reader() -> None:
        with lock.read():
            inside.set()
            leave.wait(LONG)
            events.append("old reader")

    def writer() -> None:
        with lock.write():
            time.sleep(SHORT)  # readers that got in too would be quicker
            events.append("writer")

    def new_reader() -> None:
        with lock.read():
            events.append("new reader")

    threads = [started(old_reader)]
    assert inside.wait(LONG)
    threads.append(started(writer))
    until_a_writer_waits(lock)
    threads.append(started(new_reader))
    time.sleep(SHORT)
    assert events == []  # the new reader waits, though only a reader is inside
    leave.set()
    for thread in threads:
        thread.join(LONG)
    assert events == ["old reader", "writer", "new reader"]


def test_readers_without_end_do_not_keep_a_writer_out() -> None:
    lock, written = ReadWriteLock(), threading.Event()

    def read() -> None:
        while not written.is_set():
            with lock.read():
                time.sleep(0.002)

    readers = [started(read) for _ in range(3)]

    def write() -> None:
        with lock.write():
            written.set()

    started(write)
    assert written.wait(LONG)
    for reader in readers:
        reader.join(LONG)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_exception_lets_go(kind: str) -> None:
    lock = ReadWriteLock()
    with pytest.raises(ValueError, match="inside"), lock.read() if kind == "read" else lock.write():
        raise ValueError("inside")
    entered = threading.Event()

    def write() -> None:
        with lock.write():
            entered.set()

    started(write)
    assert entered.wait(LONG)


def test_a_counter_that_is_read_and_written_loses_nothing() -> None:
    lock, count = ReadWriteLock(), [0]
    torn = list[int]()

    def add() -> None:
        for _ in range(50):
            with lock.write():
                seen = count[0]
                time.sleep(0)
                count[0] = seen + 1

    def watch() -> None:
        for _ in range(50):
            with lock.read():
                before = count[0]
                time.sleep(0)
                torn.append(count[0] - before)

    threads = [started(target) for target in (add, add, watch, watch)]
    for thread in threads:
        thread.join(2 * LONG)
    assert count[0] == 100
    assert set(torn) == {0}
