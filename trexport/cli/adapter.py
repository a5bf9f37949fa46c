"""`trexport adapter`"""

from __future__ import annotations

from pathlib import Path

import click

from trexport.cli.options import dry_run_option, json_option


@click.command("adapter")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@click.option(
    "--for", "artifact", required=True, type=click.Path(path_type=Path), help="A factored or swappable artifact."
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help=".onnx_adapter or .safetensors."
)
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@dry_run_option
@json_option
def command(
    adapters: tuple[str, ...], artifact: Path, out: Path, overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """Write adapters as a file for an ONNX artifact that takes adapters, which then draws with them instead of its own.

    An .onnx_adapter is ONNX Runtime's own: load it with LoraAdapter and RunOptions.add_active_adapter. A .safetensors
    holds the same tensors under the names of the graph's inputs, for IO binding, where ONNX Runtime ignores adapters.
    ADAPTERs go into the artifact's slots in their order; slots that are left get strength 0. Of a bank they go into its
    places, which the input adapter_index counts from 1. Of a swappable artifact the file is for its merge.onnx.
    """
    from trexport.adapter_file import fingerprint, write_adapters
    from trexport.artifact import open_artifact
    from trexport.cli.console import print_json

    opened = open_artifact(artifact, verify=False)
    tensors = write_adapters(opened, adapters, out, overwrite=overwrite, dry_run=dry_run)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if as_json:
        found = {"out": str(out), "tensors": len(tensors), "size_bytes": size_bytes, "dry_run": dry_run}
        print_json(found | {"model_version": fingerprint(opened)})
    else:
        click.echo(
            f"{'would write' if dry_run else 'written'}: {out}, {len(tensors)} tensors, {size_bytes / 1e6:.2f} MB"
        )
