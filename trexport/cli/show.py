"""Reports as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import click

from trexport.backends.base import BuildReport
from trexport.bench.every_form import EveryForm
from trexport.bench.forms import FormsReport
from trexport.bench.report import BenchReport
from trexport.cli.console import gigabytes, print_table
from trexport.deploy.check import ServerReport
from trexport.graph.factored import Factored
from trexport.manifest import ComponentRecord
from trexport.merging import PipelineMerge
from trexport.parity.report import ParityReport


def show_parity(report: ParityReport) -> None:
    """The table of `trexport validate`."""
    rows = [
        (
            f"step t={step.timestep:g}, seed {step.seed}, {'×'.join(map(str, step.sizes.values()))}"
            + (f", {step.who}" if step.who else ""),
            f"{step.max_abs:.2e}",
            f"{step.relative_l2:.2e}",
            f"{1 - step.cosine:.1e}",
            f"{step.effect:.2e}",
        )
        for step in report.steps
    ]
    title = f"{report.artifact}: {report.backend} on {report.device}, {report.dtype}, against float32 PyTorch"
    print_table(title, ["", "max abs", "relative L2", "1 − cosine", "effect of the adapters"], rows)
    tolerance = report.tolerance
    click.echo(f"limit on relative L2 {tolerance.relative_l2:g}: {tolerance.reason}")
    if report.trajectory is not None:
        t = report.trajectory
        click.echo(
            f"trajectory of {t.steps} steps, guidance {t.guidance:g}: relative L2 {t.relative_l2:.2e} "
            f"(limit {tolerance.trajectory_relative_l2:g}), PSNR {t.psnr_db:.1f} dB (at least {tolerance.psnr_db:g}), "
            f"the adapters move the image by {t.effect:.2e}"
        )
    if report.components:
        print_table(
            "the pipeline's other models, against float32 PyTorch",
            ["", "dtype", "cases", "max abs", "relative L2", "limit", "effect of the adapters"],
            [
                (
                    f"{c.component}: {c.output}",
                    c.dtype,
                    c.cases,
                    f"{c.max_abs:.2e}",
                    f"{c.relative_l2:.2e}",
                    f"{c.limit:g}",
                    "" if c.effect is None else f"{c.effect:.2e}",
                )
                for c in report.components
            ],
        )
    if report.first_deviation is not None:
        d = report.first_deviation
        click.echo(
            f"first tensor outside the tolerance: {d.tensor} ({d.operator} in {d.module or 'the UNet'}), "
            f"relative L2 {d.relative_l2:.2e}; computed from {d.last_good} with {d.last_good_relative_l2 or 0:.2e}"
        )
    if report.location_note:
        click.echo(report.location_note)
    if report.passed:
        click.echo("passed")


def show_plan(factored: Factored) -> None:
    """How the layers of a factored graph are computed, alike ones counted."""
    groups = Counter((layer.path, layer.tokens, tuple(layer.cost_ms.items())) for layer in factored.plan.values())
    rows = [
        (count, path, tokens, *(f"{cost:.3f}" for _, cost in costs))
        for (path, tokens, costs), count in sorted(groups.items(), key=lambda item: -item[0][1])
    ]
    paths = [f"{path}, ms" for path in next(iter(factored.plan.values())).cost_ms]
    sizes = ", ".join(f"{axis} {size}" for axis, size in factored.optimum.items())
    print_table(f"path plan for {factored.plan_for} at {sizes}", ["layers", "path", "tokens", *paths], rows)


def show_merge(done: PipelineMerge, offsets: Sequence[str]) -> None:
    """What `trexport merge` did: the layers that changed most, of the UNet and of every text encoder."""
    for name, report in {"": done.unet, **done.text_encoders}.items():
        if report.layers:
            most = sorted(report.layers, key=lambda layer: -layer.relative_change)[:8]
            rows = [(layer.path, f"{layer.relative_change:.3e}", f"{layer.seconds * 1e3:.1f}") for layer in most]
            where = f" of {name}" if name else ""
            title = f"{len(report.layers)} layers{where} merged, the most changed:"
            print_table(title, ["layer", "relative change", "ms"], rows)
        if report.unchanged:
            click.echo(f"{len(report.unchanged)} layers did not change, {report.unchanged[0]} first")
    if offsets:
        click.echo(f"{len(offsets)} biases and weights of normalisations changed, {offsets[0]} first")
    for name, kind in done.left_out.items():
        click.echo(f"  {name:24} {kind}, left out")


def show_pipeline(components: Mapping[str, ComponentRecord] | Sequence[str], left_out: Mapping[str, str]) -> None:
    """The other models of a pipeline, and what is not exported; nothing for a UNet alone."""
    for name in components:
        record = components[name] if isinstance(components, Mapping) else None
        why = f": {record.dtype_reason}" if record is not None and record.dtype_reason else ""
        layers = sum(adapter.layers for adapter in record.adapters) if record is not None else 0
        why += f", {layers} layers adapted" if layers else ""
        click.echo(f"  {name:24} {f'{record.class_name} {record.dtype}{why}' if record is not None else ''}".rstrip())
    for name, kind in left_out.items():
        click.echo(f"  {name:24} {kind}, left out")


def show_bench(report: BenchReport) -> None:
    """The table of `trexport bench`."""
    rows = [
        (
            result.backend,
            f"{result.latency.median_ms:.3f}",
            f"{result.latency.p10_ms:.3f}",
            f"{result.latency.p90_ms:.3f}",
            result.latency.n,
            f"{result.ratio:.3f}",
            f"{result.roofline_share:.1%}",
            gigabytes(result.peak_memory_bytes),
            f"{result.load_seconds:.1f}",
            f"{result.relative_l2:.1e}",
        )
        for result in report.results
    ]
    columns = ["", "median ms", "p10", "p90", "n", "ratio", "roofline", "peak memory", "load s", "relative L2"]
    where = report.environment.get("gpu", report.environment["cpu"])
    sizes = ", ".join(f"{axis} {size}" for axis, size in report.sizes.items())
    print_table(f"{report.model}, one step, {report.dtype}, {sizes}; {where}", columns, rows)
    click.echo(
        f"work: {report.work.flops / 1e9:.4g} GFLOP, {gigabytes(report.work.size_bytes)}; this device was seen to do "
        f"{report.ceiling.flops_per_second / 1e12:.3g} TFLOP/s and {report.ceiling.bytes_per_second / 1e9:.4g} GB/s: "
        f"at least {report.least_ms:.3g} ms"
    )
    for result in report.results:
        if result.note:
            click.echo(f"{result.backend}: {result.note}")
    for name, reason in report.skipped.items():
        click.echo(f"skipped {name}: {reason}")


def show_forms(report: FormsReport) -> None:
    """What `trexport bench` says of several forms."""
    rows = [
        (
            cost.form,
            f"{cost.step_ms:.3f}",
            f"{cost.swap_ms:.3f}",
            gigabytes(cost.model_bytes),
            gigabytes(cost.adapter_bytes),
            report.adapters.get(cost.form, ""),
        )
        for cost in report.costs
    ]
    columns = ["", "step ms", "swap ms", "model", "each adapter", "smaller from n adapters"]
    print_table("forms", columns, rows)
    for cost in report.costs:
        if cost.swapped_by is not None:
            click.echo(f"swap of {cost.form}: {cost.swapped_by}")
    for swaps, form in report.winners:
        click.echo(f"from {swaps:,.0f} swaps an hour on, on a busy device: {form}")


def show_every_form(found: EveryForm) -> None:
    """The table of `trexport bench --forms`."""
    show_bench(found.steps)
    show_forms(found.forms)
    rows = [
        (
            row.what,
            f"{row.value:.3f}{f' {row.unit}' if row.unit else ''}",
            "" if row.roofline_share is None else f"{row.roofline_share:.1%}",
        )
        for row in found.rows
    ]
    print_table("what adapters cost", ["", "", "roofline"], rows)
    for name, reason in found.left_out.items():
        click.echo(f"left out {name}: {reason}")


def show_parity_summary(reports: Mapping[str, ParityReport]) -> None:
    """One line for each of several reports."""
    rows = [
        (
            name,
            f"{report.worst.relative_l2:.2e}",
            f"{report.tolerance.relative_l2:g}",
            f"{max(step.effect for step in report.steps):.3f}",
            f"{report.trajectory.psnr_db:.1f}" if report.trajectory else "",
            "passed" if report.passed else "; ".join(report.failures),
        )
        for name, report in reports.items()
    ]
    print_table("against float32 PyTorch", ["", "relative L2", "limit", "effect", "final PSNR dB", ""], rows)


def show_build(report: BuildReport) -> None:
    """What `trexport engine` says of a build."""
    if report.layers:
        groups = Counter((layer["type"], layer["precision"]) for layer in report.layers)
        fused: Counter[tuple[str, str]] = Counter()
        for layer in report.layers:
            fused[layer["type"], layer["precision"]] += layer["fused"]
        rows = [(kind, precision, count, fused[kind, precision]) for (kind, precision), count in groups.most_common()]
        print_table("layers of the engine", ["", "precision", "layers", "operators in them"], rows)
    memory = f", {gigabytes(report.memory_bytes)} of memory beside its weights" if report.memory_bytes else ""
    click.echo(f"built in {report.seconds:.1f} s{memory}")
    if report.note:
        click.echo(report.note)


def show_checks(report: ServerReport) -> None:
    """What a running server was checked for."""
    rows = [
        (check.what, f"{check.relative_l2:.2e}", f"{check.limit:.0e}", "yes" if check.passed else "NO")
        for check in report.checks
    ]
    print_table(f"{report.url}: {report.model}", ["request", "relative L2", "limit", "equal"], rows)
    for failure in report.failures:
        click.echo(f"- {failure}")
