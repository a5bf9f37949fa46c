"""Ctrl-C and SIGTERM that arrive, whatever a library does with them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 0.2


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block with a `KeyboardInterrupt` that cannot get lost.

    One that is raised while an object is being deleted, or inside somebody's `except:`, is dropped, and the work would go
    on. So it is raised again, until it leaves the block; not while one is on its way out, for then files are being removed.
    """
    before = {number: signal.getsignal(number) for number in _signals()}

    def stop(number: int, frame: FrameType | None) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        if not _on_its_way():
            raise KeyboardInterrupt

    def dropped(args: sys.UnraisableHookArgs) -> None:
        if not isinstance(args.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(args)

    for number in before:
        signal.signal(number, stop)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = sys.__unraisablehook__
        for number, handler in before.items():
            signal.signal(number, handler)


def _signals() -> list[int]:
    again = [signal.SIGALRM] if hasattr(signal, "SIGALRM") else []
    return [signal.SIGINT, signal.SIGTERM, *again]


def _on_its_way() -> bool:
    """Whether a `KeyboardInterrupt` is being handled where the signal came in."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
