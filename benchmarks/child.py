"""Running a function in a fresh process, with its time and its peak memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

_EVERY_SECONDS = 0.01


@final
@dataclass(frozen=True)
class Measured:
    """What a run took."""

    value: Any
    seconds: float
    """Of the function, imports excluded."""
    peak_private_bytes: int
    """Peak of the process's anonymous memory: all but memory-mapped file pages, which the kernel takes back at will."""
    peak_resident_bytes: int
    """Peak of all its resident memory, mapped file pages included."""


def run_in_child(function: Callable[..., Any], *args: Any) -> Measured:
    """Call a module's function in a new process and watch it from outside (Linux).

    Raises:
        RuntimeError: the child failed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()
    private = resident = 0
    while not receiver.poll(_EVERY_SECONDS):
        if not process.is_alive():
            raise RuntimeError(f"{function.__name__} failed in its process, exit code {process.exitcode}")
        found = _memory(process.pid)
        private, resident = max(private, found["RssAnon"]), max(resident, found["VmHWM"])
    value, seconds = receiver.recv()
    process.join()
    return Measured(value, seconds, private, resident)


def _call(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    value = function(*args)
    sender.send((value, time.perf_counter() - start))


def _memory(pid: int | None) -> dict[str, int]:
    found = {"RssAnon": 0, "VmHWM": 0}
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as stream:
            for line in stream:
                name, _, rest = line.partition(":")
                if name in found:
                    found[name] = int(rest.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has just ended
    return found
