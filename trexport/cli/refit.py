"""`trexport refit`"""

from __future__ import annotations

from pathlib import Path

import click

from trexport.cli.options import adapters_argument, dry_run_option, json_option, output_options


@click.command("refit")
@click.argument("engine", type=click.Path(path_type=Path))
@adapters_argument
@output_options
@click.option("--base", help="Where the engine's base is now; where it was, unless given.")
@click.option(
    "--onnx", type=click.Path(path_type=Path), help="Of an engine built with --strip: what it was built from."
)
@dry_run_option
@json_option
def command(
    engine: Path,
    adapters: tuple[str, ...],
    out: Path,
    overwrite: bool,
    base: str | None,
    onnx: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put other adapters into the weights of a TensorRT engine that was built with --refit; none makes it the base.

    Weights are computed from the pristine base, for every layer that the old or the new adapters are on: nothing of what was
    in the engine is left. Text encoders beside it are not refitted: adapters that are in them, or have parts for them, are
    refused, unless they stay the same. Engines of factored and swappable artifacts need no refit: their adapters are inputs.
    """
    from trexport.artifact import open_artifact
    from trexport.cli.console import print_json, progress_for
    from trexport.models.adapters import open_adapters
    from trexport.models.base import open_base
    from trexport.models.pipeline import text_encoders_of
    from trexport.refit import refit_engine

    progress = progress_for(as_json)
    opened = open_artifact(engine, progress=progress)
    source = open_base(base or opened.manifest.base.name)
    manifest = refit_engine(
        opened,
        source,
        open_adapters(adapters, source, lambda: text_encoders_of(source) if opened.manifest.components else None),
        out,
        open_artifact(onnx, progress=progress) if onnx is not None else None,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )
    if manifest is None:
        if as_json:
            print_json({"out": str(out), "dry_run": True})
        else:
            click.echo(f"would refit {engine} into {out}")
        return
    if as_json:
        print_json({"out": str(out)} | manifest.to_dict())
        return
    click.echo(f"written: {out}")
