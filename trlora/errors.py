"""Errors that a user of trlora can cause. Each message says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrloraError(Exception):
    """Base of every error that trlora raises on purpose."""


class ShapeError(TrloraError, ValueError):
    """Shapes, modes or ranks that do not fit together."""


class SpecError(TrloraError, ValueError):
    """An adapter description (type, rank, modes, …) that cannot be built."""


class TargetError(TrloraError, LookupError):
    """A module that is not there, or that cannot be adapted."""


class CheckpointError(TrloraError, ValueError):
    """An adapter file that is refused."""


class FitError(TrloraError, ValueError):
    """Weights that no adapter can be fitted to, or none as small or as near as asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; the nearest existing name is 'x'"`, or nothing when no name of `known` is like `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest existing name is {matches[0]!r}" if matches else ""
