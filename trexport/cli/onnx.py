"""`trexport onnx`"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from trexport.cli.options import (
    adapters_argument,
    base_argument,
    base_options,
    dry_run_option,
    dtype_option,
    json_option,
    output_options,
    size_options,
)
from trexport.io_spec import Dtype

PathName = Literal["activations", "dense", "weight"]


def _optimum(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    sizes = value.split("x")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise click.BadParameter(f"{value!r}, expected a size for each axis, for a UNet as in 2x64x64x77")
    return tuple(map(int, sizes))


@click.command("onnx")
@base_argument
@adapters_argument
@output_options
@dtype_option("fp32", "Of the weights and of all inputs and outputs but the timestep.")
@click.option("--opset", type=int, help="18 to 23; chosen, with the reason in the manifest, where not given.")
@click.option(
    "--factored", is_flag=True, help="Keep adapters factored: operators of domain ai.trlora, cores as inputs."
)
@click.option("--swappable", is_flag=True, help="Keep adapters out: weights that a second model, merge.onnx, computes.")
@click.option(
    "--bank",
    type=click.IntRange(min=1),
    metavar="K",
    help="Factored: room for K adapters, of which each sample takes its own.",
)
@click.option("--blank", is_flag=True, help="Only the adapters' shapes; unfed, the model is the base.")
@click.option(
    "--path", type=click.Choice(["activations", "dense", "weight"]), help="Factored: force one; planned if not given."
)
@click.option(
    "--plan-for",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Factored: device to plan for.",
)
@click.option(
    "--optimum", callback=_optimum, metavar="BxHxWxS", help="Factored: batch, height, width, tokens to plan for."
)
@click.option(
    "--timestep-per-sample", is_flag=True, help="A timestep for each sample, so that servers can batch steps."
)
@click.option(
    "--unet-only", "--model-only", "unet_only", is_flag=True, help="Leave a pipeline's text encoders and VAE out."
)
@click.option("--static", is_flag=True, help="Fix every axis, at the model's own sizes where no size is given.")
@size_options
@base_options
@dry_run_option
@json_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    overwrite: bool,
    dtype: Dtype,
    opset: int | None,
    factored: bool,
    swappable: bool,
    bank: int | None,
    blank: bool,
    path: PathName | None,
    plan_for: str,
    optimum: tuple[int, ...] | None,
    timestep_per_sample: bool,
    unet_only: bool,
    static: bool,
    batch_size: int | None,
    height: int | None,
    width: int | None,
    sequence_length: int | None,
    revision: str | None,
    variant: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export a model or a whole pipeline to ONNX, with adapters merged into the weights, kept factored, or swappable.

    Of a pipeline, text encoders and the VAE's encoder and decoder are exported too, and tokenizers and the scheduler
    copied, so that optimum's ORTDiffusionPipeline loads OUT. What adapters have for text encoders is merged into them,
    unless adapters are kept factored or swappable. In fp16 a VAE that overflows stays in fp32.

    Inputs, outputs and layout are those of optimum: OUT/unet/model.onnx with model.onnx_data (OUT/transformer of Stable
    Diffusion 3 and Flux). Initialisers keep their PyTorch names. Axes are free unless they are given a size or --static is
    set. BASE and ADAPTER as in `merge`.

    With --factored, each adapted layer is one operator of domain ai.trlora, a function of plain operators that every
    runtime takes. Cores and strength are initialisers that may be fed: see `trexport adapter`. With --bank K, cores of K
    adapters are stacked, and the inputs adapter_index (0: none) and adapter_strength choose one for each sample.

    With --swappable, the adapted weights may be fed, and merge.onnx computes them from adapters of the given ones' shapes:
    a step costs what the merged model's does. trexport.session.Session serves all of these.
    """
    from trexport.cli.console import gigabytes, print_json, progress_for
    from trexport.cli.show import show_pipeline, show_plan
    from trexport.errors import UsageError
    from trexport.graph.export import ExportOptions, export_onnx, free_or_fixed, plan_export
    from trexport.graph.factored import FactoredOptions
    from trexport.graph.swappable import SwappableOptions
    from trexport.models.adapters import open_adapters
    from trexport.models.architectures import in_order
    from trexport.models.base import open_base
    from trexport.models.pipeline import open_pipeline

    given = {"--bank": bank, "--path": path, "--optimum": optimum}
    if not factored and any(given.values()):
        raise UsageError(f"{next(name for name, value in given.items() if value)} goes with --factored")
    if factored and swappable:
        raise UsageError("--factored and --swappable are two forms; choose one")
    if blank and not (factored or swappable):
        raise UsageError("--blank goes with --factored or --swappable")
    opened = open_base(base, revision=revision, variant=variant)
    pipeline = None if unet_only else open_pipeline(opened)
    # adapters that come and go are the UNet's: text encoders would keep those of the export
    encoders = None if pipeline is None or factored or swappable else pipeline.text_encoders
    bound = open_adapters(adapters, opened, lambda: encoders)
    sizes = {"batch_size": batch_size, "height": height, "width": width, "sequence_length": sequence_length}
    fixed = free_or_fixed(sizes, static=static, config=opened.config)
    options = ExportOptions(
        dtype=dtype,
        opset=opset,
        fixed=fixed,
        factored=FactoredOptions(blank=blank, path=path, bank=bank, plan_for=plan_for) if factored else None,
        swappable=SwappableOptions(blank=blank) if swappable else None,
        timestep_per_sample=timestep_per_sample,
        optimum=None if optimum is None else in_order(opened.config, optimum),
    )
    plan = plan_export(opened, bound, out, options, pipeline=pipeline, overwrite=overwrite)
    if dry_run:
        if as_json:
            would = {"out": str(out), "dry_run": True, "size_bytes": plan.size_bytes, "opset": plan.choice.opset}
            print_json(would | {"components": list(plan.components), "left_out": dict(plan.left_out)})
        else:
            click.echo(
                f"would write {gigabytes(plan.size_bytes)} to {out}, opset {plan.choice.opset}: {plan.choice.reason}"
            )
            show_pipeline(list(plan.components), plan.left_out)
        return
    manifest = export_onnx(
        opened, bound, out, options, pipeline=pipeline, overwrite=overwrite, progress=progress_for(as_json)
    )
    if as_json:
        print_json({"out": str(out)} | manifest.to_dict())
        return
    click.echo(f"opset {manifest.opset}: {manifest.opset_reason}")
    if plan.factored is not None:
        show_plan(plan.factored)
    for tensor in [*manifest.io.inputs, *manifest.io.outputs]:
        click.echo(f"  {tensor.name:24} {tensor.dtype}  {list(tensor.axes)}")
    show_pipeline(manifest.components, manifest.left_out)
    click.echo(f"written: {out}")
