"""The command line: `trexport`. Thin: parse, call one function, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, final

import click

from trexport import __version__
from trexport.cli.interrupts import interruptible
from trexport.errors import AdapterWarning, TrexportError

# name → (module, one line for the list of commands)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("trexport.cli.demo", "The whole line on the shipped sample: merge, export, prove, measure, draw."),
    "inspect": ("trexport.cli.inspect", "Say what a file or folder is."),
    "merge": ("trexport.cli.merge", "Fold adapters into a dense model."),
    "onnx": (
        "trexport.cli.onnx",
        "Export a model or a pipeline to ONNX, adapters merged in, kept factored, or swappable.",
    ),
    "convert": ("trexport.cli.convert", "Write an adapter in another form."),
    "adapter": ("trexport.cli.adapter", "Write adapters as a file for an ONNX artifact that takes adapters."),
    "fit": ("trexport.cli.fit", "Fit a small adapter to what a fine-tune made of a base."),
    "engine": ("trexport.cli.engine", "Build a compiled engine from an artifact."),
    "refit": ("trexport.cli.refit", "Put other adapters into the weights of a built TensorRT engine."),
    "validate": ("trexport.cli.validate", "Prove an artifact equal to PyTorch, or fail."),
    "deploy": ("trexport.cli.deploy", "Lay out what an inference server needs, and check one that runs."),
    "bench": ("trexport.cli.bench", "Measure backends side by side."),
}


@final
class _Failure(click.ClickException):
    """A known error: one message, the documented exit code."""

    def __init__(self, message: str, code: int, *, as_json: bool) -> None:
        super().__init__(message)
        self.code = code
        self._as_json = as_json

    def show(self, file: Any = None) -> None:
        super().show(file)
        if self._as_json:
            click.echo(json.dumps({"error": self.message, "exit_code": self.code}))


@final
class _Commands(click.Group):
    """Commands imported when they run, so that help is instant and a missing package breaks only what needs it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if close:
                raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            failure = _known(error)
            if failure is None:
                raise
            message, code = failure
            raise _Failure(message, code, as_json="--json" in sys.argv or "--json" in ctx.args) from error


def _known(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code of an error that a user can cause; None for a fault of ours."""
    if isinstance(error, TrexportError):
        return str(error), error.exit_code
    trlora_errors = sys.modules.get("trlora.errors")  # not imported here: it would import torch
    if trlora_errors is not None and isinstance(error, trlora_errors.TrloraError):
        return str(error), 1
    if isinstance(error, (FileExistsError, FileNotFoundError, PermissionError)):
        return str(error), 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full, nothing was left half-made ({error}); free some space, or choose another folder", 1
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is needed for this command and not installed: pip install {error.name}", 4
    return None


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 parity not met, 4 a backend or device is missing.",
)
@click.version_option(__version__, prog_name="trexport")
def cli() -> None:
    """Trained adapters of diffusion models to production: merge, export, prove equal, measure."""


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as a line for users; others as Python shows them."""

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, AdapterWarning):
            click.echo(f"warning: {message}", err=True)
        else:
            before(message, category, *rest)

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdapterWarning)  # the same for every adapter that it is true of
        warnings.showwarning = show
        yield


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The entry point."""
    try:
        with interruptible(), _plain_warnings():
            code = cli.main(args=args, prog_name="trexport", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.code if isinstance(error, _Failure) else error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was left half-made", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)  # what `ctx.exit` was given
