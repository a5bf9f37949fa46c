"""`trexport validate`"""

from __future__ import annotations

from pathlib import Path

import click

from trexport.cli.options import device_option, given_sizes, json_option, size_options


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(item) for item in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or any(not 0 <= number < 1000 for number in numbers):
        raise click.BadParameter(f"{value!r}, expected numbers from 0 to 999 with commas between them")
    return numbers


@click.command("validate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--base", help="Where the base is now; where it was, unless given.")
@click.option("--adapter", "adapters", multiple=True, help="Likewise for each adapter, in their order.")
@click.option("--timesteps", default="1,250,500,750,999", show_default=True, callback=_numbers, help="To check.")
@click.option("--seeds", type=click.IntRange(min=1), default=2, show_default=True, help="Random inputs for each.")
@click.option(
    "--trajectory-steps", type=click.IntRange(min=0), default=10, show_default=True, help="0 leaves the trajectory out."
)
@click.option("--max-relative-l2", type=float, help="Limit for one step; the precision's own unless given.")
@click.option("--no-locate", is_flag=True, help="On failure, do not look for the first tensor that is wrong.")
@size_options
@device_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    base: str | None,
    adapters: tuple[str, ...],
    timesteps: tuple[float, ...],
    seeds: int,
    trajectory_steps: int,
    max_relative_l2: float | None,
    no_locate: bool,
    batch_size: int | None,
    height: int | None,
    width: int | None,
    sequence_length: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Prove an artifact equal to PyTorch, or exit with 3 and say where it is not.

    The reference is float32 PyTorch with the adapters attached, never merged. Checked are single steps over timesteps,
    seeds and two shapes, and a whole denoising trajectory; that everything is finite; and that the adapters do change
    the output.
    """
    from trexport.artifact import open_artifact
    from trexport.backends import device_of
    from trexport.cli.console import print_json, progress_for
    from trexport.cli.show import show_parity
    from trexport.errors import ParityError
    from trexport.parity.validate import ValidateOptions, validate

    progress = progress_for(as_json)
    opened = open_artifact(artifact, progress=progress)
    source, bound = opened.sources(base, adapters, progress=progress)
    sizes = {"batch_size": batch_size, "height": height, "width": width, "sequence_length": sequence_length}
    options = ValidateOptions(
        timesteps=timesteps,
        seeds=range(seeds),
        trajectory_steps=trajectory_steps,
        sizes=given_sizes(sizes),
        relative_l2=max_relative_l2,
        locate=not no_locate,
    )
    report = validate(opened, source, bound, device_of(device), options, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        show_parity(report)
    if not report.passed:
        if as_json:
            ctx.exit(ParityError.exit_code)
        raise ParityError(f"{artifact}: parity not met: " + "; ".join(report.failures))
