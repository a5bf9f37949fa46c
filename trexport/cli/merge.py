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
@click.option("--unet-only", is_flag=True, help="Leave out what adapters have for text encoders.")
@base_options
@dry_run_option
@json_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    overwrite: bool,
    dtype: Dtype | None,
    unet_only: bool,
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

    Where BASE is a whole pipeline and an adapter has parts for its text encoders, the result is a pipeline too, with the
    adapter in both: a folder that `DiffusionPipeline.from_pretrained` loads.

    Every tensor of every adapter is bound to a layer, or the command fails and names it.
    """
    from trexport.cli.console import gigabytes, print_json, progress_for
    from trexport.cli.show import show_merge
    from trexport.merging import PipelineMerge, merge, merge_pipeline, plan_merge, plan_pipeline_merge
    from trexport.models.adapters import on_component, open_adapters
    from trexport.models.base import open_base
    from trexport.models.model import offsets_of
    from trexport.models.pipeline import open_pipeline, text_encoders_of

    opened = open_base(base, revision=revision, variant=variant)
    bound = open_adapters(adapters, opened, lambda: None if unet_only else text_encoders_of(opened))
    pipeline = open_pipeline(opened) if any(adapter.components for adapter in bound) else None
    if dry_run:
        planned = (
            plan_merge(opened, bound, out, dtype, overwrite=overwrite)
            if pipeline is None
            else plan_pipeline_merge(opened, pipeline, bound, out, dtype, overwrite=overwrite)
        )
        if as_json:
            print_json(vars(planned) | {"out": str(out), "dry_run": True})
        else:
            adapted = ", ".join(f"{count} of {name}" for name, count in planned.adapted.items())
            size = gigabytes(planned.size_bytes)
            click.echo(f"would write {size} to {out}: {planned.tensors} tensors; adapted: {adapted}")
        return
    progress = progress_for(as_json)
    if pipeline is None:
        unet = merge(opened, bound, out, dtype=dtype, overwrite=overwrite, progress=progress)
        done = PipelineMerge(unet, {}, {})
    else:
        done = merge_pipeline(opened, pipeline, bound, out, dtype=dtype, overwrite=overwrite, progress=progress)
    offsets = list(offsets_of(bound))
    for name in done.text_encoders:
        offsets += [f"{name}/{parameter}" for parameter in offsets_of(on_component(bound, name))]
    if as_json:
        encoders = {name: [vars(layer) for layer in report.layers] for name, report in done.text_encoders.items()}
        fields = {
            "out": str(out),
            "layers": [vars(layer) for layer in done.unet.layers],
            "unchanged": done.unet.unchanged,
            "seconds": done.unet.seconds + sum(report.seconds for report in done.text_encoders.values()),
            "offsets": offsets,
            "text_encoders": encoders,
            "left_out": dict(done.left_out),
        }
        print_json(fields)
        return
    show_merge(done, offsets)
    click.echo(f"written: {out}")
