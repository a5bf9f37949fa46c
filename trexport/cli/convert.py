"""`trexport convert`"""

from __future__ import annotations

from pathlib import Path

import click

from trexport.cli.options import dry_run_option, dtype_option, json_option


@click.command("convert")
@click.argument("adapter", metavar="ADAPTER[=STRENGTH]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A folder, or a .safetensors file.")
@click.option(
    "--to",
    type=click.Choice(["trlora", "peft", "diffusers", "kohya"]),
    default="trlora",
    show_default=True,
    help="The format to write; all but trlora's are LoRA.",
)
@click.option("--base", help="The base, for adapters whose transform or magnitude depends on its weights.")
@click.option("--rank", type=click.IntRange(min=1), help="The greatest rank of a LoRA.")
@click.option("--max-error", type=click.FloatRange(min=0), help="Refuse a greater relative error of all layers.")
@dtype_option("fp32", "Of a LoRA's tensors.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@dry_run_option
@json_option
def command(
    adapter: str,
    out: Path,
    to: str,
    base: str | None,
    rank: int | None,
    max_error: float | None,
    dtype: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write an adapter in another form.

    ADAPTER is of any format that is read: trlora's, PEFT's, diffusers', kohya's or LyCORIS', or an .onnx_adapter file of
    trexport adapter for a factored model. To trlora's own form the way is
    exact. As a LoRA it is exact where the adapter is one, or a tensor ring, LoHa or LoKr without a transform, in as many
    ranks as those have; otherwise --rank and --base give the best approximation, with its error. Strengths are multiplied
    in.
    """
    from trexport.cli.console import print_json, print_table
    from trexport.convert import convert, summary
    from trexport.models.base import open_base
    from trexport.models.model import DTYPES

    found = convert(
        adapter,
        out,
        to,
        base=None if base is None else open_base(base),
        rank=rank,
        max_error=max_error,
        dtype=DTYPES[dtype],  # type: ignore[index]
        overwrite=overwrite,
        dry_run=dry_run,
    )
    for note in found.notes:
        click.echo(f"warning: {note}", err=True)
    if as_json:
        print_json({**summary(found), "out": str(out), "dry_run": dry_run})
        return
    if not found.exact:
        worst = sorted(found.layers, key=lambda layer: -layer.relative_error)[:10]
        rows = [(layer.path, layer.rank, f"{layer.relative_error:.3e}") for layer in worst]
        print_table("the layers with the greatest errors", ["layer", "rank", "relative error"], rows)
    how = "exact" if found.exact else f"relative error {found.relative_error:.3e}"
    click.echo(
        f"{'would write' if dry_run else 'written'}: {out}, {found.source} → {found.to}, {len(found.layers)} layers, {how}"
    )
