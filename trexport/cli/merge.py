"""`trexport merge`"""

from __future__ import annotations

from pathlib import Path

import click

from trexport.cli.options import (
    adapters_argument,
    base_argument,
    base_options,
    dry_run_option,
    dtype_option,
    json_option,
    output_options,
)
from trexport.io_spec import Dtype


@click.command("merge")
@base_argument
@adapters_argument
@output_options
@dtype_option(None, "Of the result; the base's own where not given.")
@base_options
@dry_run_option
@json_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    overwrite: bool,
    dtype: Dtype | None,
    revision: str | None,
    variant: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fold adapters into the weights of a model: a folder that its class's `from_pretrained` loads.

    BASE is the folder of a diffusers pipeline or of one model (UNet, transformer of Stable Diffusion 3 or Flux, ControlNet,
    CLIP text encoder), a Hub id, random:sd15, random:sdxl, random:sd3-tiny, …, or sample:digits.
    ADAPTER is a checkpoint folder or file, sample:digits/NAME, or random:tlora:2:6; =STRENGTH stands in for the
    checkpoint's own strength.

    Every tensor of every adapter is bound to a layer, or the command fails and names it.
    """
    from trexport.cli.console import gigabytes, print_json, print_table, progress_for
    from trexport.merging import merge, plan_merge
    from trexport.models.adapters import open_adapters
    from trexport.models.base import open_base

    opened = open_base(base, revision=revision, variant=variant)
    bound = open_adapters(adapters, opened)
    if dry_run:
        plan = plan_merge(opened, bound, out, dtype, overwrite=overwrite)
        fields = {"out": str(out), "tensors": plan.tensors, "adapted": plan.adapted, "size_bytes": plan.size_bytes}
        if as_json:
            print_json(fields | {"dry_run": True})
        else:
            click.echo(
                f"would write {gigabytes(plan.size_bytes)} to {out}: {plan.tensors} tensors, {plan.adapted} adapted"
            )
        return
    report = merge(opened, bound, out, dtype=dtype, overwrite=overwrite, progress=progress_for(as_json))
    if as_json:
        layers = [vars(layer) for layer in report.layers]
        print_json({"out": str(out), "layers": layers, "unchanged": report.unchanged, "seconds": report.seconds})
        return
    most = sorted(report.layers, key=lambda layer: -layer.relative_change)[:8]
    rows = [(layer.path, f"{layer.relative_change:.3e}", f"{layer.seconds * 1e3:.1f}") for layer in most]
    print_table(f"{len(report.layers)} layers merged, the most changed:", ["layer", "relative change", "ms"], rows)
    if report.unchanged:
        click.echo(f"{len(report.unchanged)} layers did not change, {report.unchanged[0]} first")
    click.echo(f"written: {out}")
