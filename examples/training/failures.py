"""What ends a recipe: one clear message and an exit code, never a traceback for what a user can cause."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from trexport.errors import TrexportError
from trlora.errors import TrloraError


class RecipeError(Exception):
    """Data, a model or a machine that the recipe cannot work with. Exit code 1."""

    exit_code: ClassVar[int] = 1


class OptionError(RecipeError):
    """Options that cannot be what the user meant. Exit code 2."""

    exit_code: ClassVar[int] = 2


def listed(lines: Sequence[str], shown: int = 5) -> str:
    """The first lines, indented below each other, and how many more there are."""
    more = [f"and {len(lines) - shown} more"] if len(lines) > shown else []
    return "".join(f"\n  {line}" for line in [*lines[:shown], *more])


def say(message: str) -> None:
    """Tell people something, on standard error."""
    print(message, file=sys.stderr, flush=True)


def finish(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """Run a recipe; gives its exit code: 0 done, 1 failed, 2 wrong options, 130 interrupted."""
    try:
        main(arguments)
    except (RecipeError, TrexportError) as error:
        say(f"error: {error}")
        return error.exit_code
    except TrloraError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; --resume_from_checkpoint latest goes on from the last checkpoint")
        return 130
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        say(
            "error: out of memory outside of the training steps (loading, encoding or drawing); try --mixed_precision bf16, "
            "a smaller --resolution, or fewer pictures at once. What was written stays: the same command goes on there, "
            "with --resume_from_checkpoint latest where there are checkpoints"
        )
        return 1
    return 0


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator says so with a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
