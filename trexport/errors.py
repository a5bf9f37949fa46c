"""Errors that a user of trexport can cause, each with the exit code that the command line documents."""

from __future__ import annotations

from typing import ClassVar


class TrexportError(Exception):
    """Base of every error that trexport raises on purpose: one clear message, no traceback. Exit code 1."""

    exit_code: ClassVar[int] = 1


class UsageError(TrexportError):
    """Arguments that cannot be what the user meant. Exit code 2."""

    exit_code: ClassVar[int] = 2


class BaseError(TrexportError):
    """A base model that is not there, or not whole."""


class ArtifactError(TrexportError):
    """An artifact that is not there, not whole, or not what its manifest says."""


class ExportError(TrexportError):
    """An export that did not succeed, or whose result is not what was asked for."""


class RunError(TrexportError):
    """A run that a runtime refused or broke off."""


class ParityError(TrexportError):
    """An artifact that is not equal to its reference, or an adapter that changes nothing. Exit code 3."""

    exit_code: ClassVar[int] = 3


class MissingError(TrexportError):
    """A package, device or backend that is not here; the message says what to install. Exit code 4."""

    exit_code: ClassVar[int] = 4


class AdapterWarning(UserWarning):
    """Something of an adapter that is left out, though the rest is taken."""
