"""`trexport bench`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trexport.cli.options import adapters_argument, device_option, dtype_option, given_sizes, json_option, size_options


@click.command("bench")
@click.argument("target")
@adapters_argument
@click.option("--backend", "backends", multiple=True, help="Repeat for several; all that are here, unless given.")
@dtype_option(None, "Of the torch backends; an artifact's own, otherwise fp32, where not given.")
@click.option("--iterations", type=click.IntRange(min=1), default=20, show_default=True, help="Measured rounds.")
@click.option("--warm-up", type=click.IntRange(min=0), default=3, show_default=True, help="Rounds before them.")
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="Write bench.json and bench.png.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
@click.option("--base", help="For an artifact: where its base is now; where it was, unless given.")
@click.option("--adapter", "moved", multiple=True, help="Likewise for each adapter, in their order.")
@size_options
@device_option
@json_option
def command(
    target: str,
    adapters: tuple[str, ...],
    backends: tuple[str, ...],
    dtype: str | None,
    iterations: int,
    warm_up: int,
    out: Path | None,
    overwrite: bool,
    base: str | None,
    moved: tuple[str, ...],
    batch_size: int | None,
    height: int | None,
    width: int | None,
    sequence_length: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure one UNet step in several backends, side by side in one run.

    TARGET is an artifact of `trexport onnx`, which brings its base and adapters along, or a BASE with ADAPTERs for the
    backends that need no artifact. Latencies are medians with p10 and p90; on CUDA, device time of a CUDA graph on
    resident buffers. Ratios are to the first backend.
    """
    from trexport.artifact import open_artifact
    from trexport.backends import BACKENDS, OnnxFile, backend_of, device_of
    from trexport.bench.report import plot
    from trexport.bench.run import BenchOptions, bench
    from trexport.cli.console import print_json, progress_for
    from trexport.cli.show import show_bench
    from trexport.errors import UsageError
    from trexport.jsonable import finite
    from trexport.manifest import MANIFEST_NAME
    from trexport.models.adapters import open_adapters
    from trexport.models.base import open_base
    from trlora.files import atomic_folder, check_free

    for name in backends:
        backend_of(name)
    if out is not None:
        check_free(out, overwrite=overwrite)
    progress = progress_for(as_json)
    onnx: OnnxFile | None = None
    chosen = dtype
    if (Path(target) / MANIFEST_NAME).is_file():
        if adapters:
            raise UsageError("an artifact has its adapters in it; give a BASE to measure other ones")
        artifact = open_artifact(target, progress=progress)
        source, bound = artifact.sources(base, moved, progress=progress)
        chosen = dtype or artifact.manifest.dtype
        if chosen != artifact.manifest.dtype:
            raise UsageError(f"--dtype {dtype} given, the artifact is {artifact.manifest.dtype}; export another")
        if artifact.manifest.kind == "onnx":
            onnx = OnnxFile(artifact.onnx_path, artifact.manifest.io)
    else:
        source = open_base(target)
        bound = open_adapters(adapters, source)
    sizes = {"batch_size": batch_size, "height": height, "width": width, "sequence_length": sequence_length}
    options = BenchOptions(
        backends=backends or tuple(BACKENDS),
        dtype=chosen or "fp32",  # type: ignore[arg-type]
        sizes=given_sizes(sizes),
        warm_up=warm_up,
        iterations=iterations,
        skip_missing=not backends,
    )
    report = bench(source, bound, onnx, device_of(device), options, progress=progress)
    if out is not None:
        with atomic_folder(out, overwrite=overwrite) as folder:
            (folder / "bench.json").write_text(
                json.dumps(finite(report.to_dict()), indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )
            plot(report, folder / "bench.png")
    if as_json:
        print_json(report.to_dict())
    else:
        show_bench(report)
        if out is not None:
            click.echo(f"written: {out}")
