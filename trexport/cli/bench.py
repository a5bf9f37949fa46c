"""`trexport bench`"""

from __future__ import annotations

import json
from dataclasses import asdict
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
@click.option(
    "--forms",
    is_flag=True,
    help="Of a BASE with ADAPTERs: export merged, factored, swappable and a bank, build the engines, measure all; minutes.",
)
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
    forms: bool,
    base: str | None,
    moved: tuple[str, ...],
    batch_size: int | None,
    height: int | None,
    width: int | None,
    sequence_length: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure one step in several backends, side by side in one run.

    TARGET is an artifact of `trexport onnx` or `trexport engine`, which brings its base and adapters along, or a BASE with
    ADAPTERs for the backends that need no artifact. Several artifacts of one base, merged, factored or swappable, ONNX or
    engines, are measured side by side, swaps of adapters too, and it is said from how many swaps an hour, and adapters,
    which form wins. With --forms all of them are made first, in a folder that is gone afterwards.

    A factored artifact is run as a session runs it: on CUDA, unless its adapters scale biases, with weights that are
    written when adapters are activated, not with cores in every step.

    Latencies are medians with p10 and p90; on CUDA, device time of a CUDA graph on resident buffers. Ratios are to the first
    backend, relative L2 to eager torch in float32.
    """
    from trexport.artifact import Artifact, open_artifact
    from trexport.backends import BACKENDS, EngineFile, OnnxFile, backend_of, device_of
    from trexport.bench.forms import FormsReport, cost_of, file_for, form_name, report_forms
    from trexport.bench.report import plot
    from trexport.bench.run import BenchOptions, bench
    from trexport.cli.console import print_json, progress_for
    from trexport.cli.show import show_bench, show_forms
    from trexport.errors import UsageError
    from trexport.jsonable import finite
    from trexport.manifest import MANIFEST_NAME
    from trexport.models.adapters import open_adapters
    from trexport.models.base import open_base
    from trexport.session.sources import backend_for
    from trlora.files import atomic_folder, check_free

    for name in backends:
        backend_of(name)
    if out is not None:
        check_free(out, overwrite=overwrite)
    progress = progress_for(as_json)
    sizes = given_sizes(
        {"batch_size": batch_size, "height": height, "width": width, "sequence_length": sequence_length}
    )
    if forms:
        if (Path(target) / MANIFEST_NAME).is_file() or backends:
            raise UsageError("--forms makes its own artifacts and engines: give a BASE with ADAPTERs, and no --backend")
        _every_form(target, adapters, dtype or "fp32", device, sizes, warm_up, iterations, out, overwrite, as_json)
        return
    artifacts: list[Artifact] = []
    chosen = dtype
    if (Path(target) / MANIFEST_NAME).is_file():
        for name in (target, *adapters):
            if not (Path(name) / MANIFEST_NAME).is_file():
                raise UsageError(
                    f"{name}: no artifact; an artifact has its adapters in it, give a BASE to measure other ones"
                )
            artifacts.append(open_artifact(name, progress=progress))
        first = next((artifact for artifact in artifacts if artifact.manifest.adapters), artifacts[0])
        for artifact in artifacts:
            if artifact.manifest.base.content_hash != first.manifest.base.content_hash:
                raise UsageError(f"{artifact.folder}: made from another base than {first.folder}")
            if artifact.manifest.dtype != (chosen or first.manifest.dtype):
                expected = chosen or first.manifest.dtype
                raise UsageError(
                    f"{artifact.folder}: in {artifact.manifest.dtype}, expected {expected}; export another"
                )
        chosen = first.manifest.dtype
        source, bound = first.sources(base, moved, progress=progress)
    else:
        source = open_base(target)
        bound = open_adapters(adapters, source)
    where = device_of(device)
    exported = [(form_name(a), a, file_for(a, bound, where)) for a in artifacts if a.manifest.kind != "dense"]
    several = len(exported) > 1
    onnx = {form if several else "": file for form, _, file in exported if isinstance(file, OnnxFile)}
    engines = {
        f"{file.record.backend}, {form}" if several else file.record.backend: file
        for form, _, file in exported
        if isinstance(file, EngineFile)
    }
    if len(onnx) + len(engines) < len(exported):
        raise UsageError("two artifacts of the same form and backend given; give one of each")
    options = BenchOptions(
        backends=backends or tuple(BACKENDS),
        dtype=chosen or "fp32",  # type: ignore[arg-type]
        sizes=sizes,
        warm_up=warm_up,
        iterations=iterations,
        skip_missing=not backends,
    )
    report = bench(source, bound, onnx, where, options, engines=engines, progress=progress)
    costs_of_forms: FormsReport | None = None
    if several:
        results = {result.backend: result for result in report.results}
        rows = [(artifact, results.get(f"{backend_for(artifact)}, {form}")) for form, artifact, _ in exported]
        costs = [cost_of(artifact, bound, where, result) for artifact, result in rows if result is not None]
        costs_of_forms = report_forms(costs) if costs else None
    fields = report.to_dict() | ({"forms": asdict(costs_of_forms)} if costs_of_forms is not None else {})
    if out is not None:
        with atomic_folder(out, overwrite=overwrite) as folder:
            (folder / "bench.json").write_text(
                json.dumps(finite(fields), indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )
            plot(report, folder / "bench.png")
    if as_json:
        print_json(fields)
    else:
        show_bench(report)
        if costs_of_forms is not None:
            show_forms(costs_of_forms)
        if out is not None:
            click.echo(f"written: {out}")


def _every_form(
    target: str,
    arguments: tuple[str, ...],
    dtype: str,
    device: str,
    sizes: dict[str, int],
    warm_up: int,
    iterations: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """`--forms`"""
    import tempfile

    from trexport.backends import device_of
    from trexport.bench.every_form import bench_every_form
    from trexport.bench.report import plot
    from trexport.bench.run import BenchOptions
    from trexport.cli.console import print_json, progress_for
    from trexport.cli.show import show_every_form
    from trexport.jsonable import finite
    from trexport.models.adapters import open_adapters
    from trexport.models.base import open_base
    from trlora.files import atomic_folder

    base = open_base(target)
    adapters = open_adapters(arguments, base)
    options = BenchOptions(dtype=dtype, sizes=sizes, warm_up=warm_up, iterations=iterations)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="trexport-bench-") as folder:
        found = bench_every_form(
            base, adapters, device_of(device), Path(folder), options, progress=progress_for(as_json)
        )
    if out is not None:
        with atomic_folder(out, overwrite=overwrite) as temporary:
            text = json.dumps(finite(found.to_dict()), indent=2, allow_nan=False)
            (temporary / "bench.json").write_text(f"{text}\n", encoding="utf-8")
            plot(found.steps, temporary / "bench.png")
    if as_json:
        print_json(found.to_dict())
        return
    show_every_form(found)
    if out is not None:
        click.echo(f"written: {out}")
