"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from trexport.io_spec import DTYPES

_Command = TypeVar("_Command", bound=Callable[..., Any])

base_argument = click.argument("base")
adapters_argument = click.argument("adapters", nargs=-1, metavar="[ADAPTER[=STRENGTH]]...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and no progress bars.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done; check the inputs; write nothing."
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: CUDA where torch sees a device.",
)


def dtype_option(default: str | None, help_text: str) -> Callable[[_Command], _Command]:
    """`--dtype`."""
    return click.option("--dtype", type=click.Choice(DTYPES), default=default, show_default=True, help=help_text)


def output_options(command: _Command) -> _Command:
    """`-o/--out` and `--overwrite`."""
    path = click.Path(path_type=Path, file_okay=False)
    command = click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")(command)
    return click.option("-o", "--out", required=True, type=path, help="Output folder.")(command)


def base_options(command: _Command) -> _Command:
    """Options that choose among what a BASE holds."""
    command = click.option("--variant", help="Weight variant of the base, for instance fp16.")(command)
    return click.option("--revision", help="Branch, tag or commit of a Hub id.")(command)


def size_options(command: _Command) -> _Command:
    """The sizes of a step's inputs."""
    for axis, help_text in (
        ("sequence-length", "Tokens of the conditioning."),
        ("width", "Width of the latents (an eighth of the image's, in Stable Diffusion)."),
        ("height", "Height of the latents."),
        ("batch-size", "Samples in a batch; classifier-free guidance runs two for an image."),
    ):
        command = click.option(f"--{axis}", type=click.IntRange(min=1), help=help_text)(command)
    return command


def given_sizes(values: Mapping[str, int | None]) -> dict[str, int]:
    """The sizes that were given, by axis."""
    return {axis: size for axis, size in values.items() if size is not None}
