"""The report as one HTML file, without anything outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from trexport.bench.forms import FormsReport
from trexport.bench.report import BenchReport
from trexport.demo.pictures import data_url
from trexport.parity.report import ParityReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #d8dde3; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
.pictures td { vertical-align: middle; text-align: left } .pictures img { display: block; image-rendering: pixelated }
.passed { color: #1a7f37; font-weight: 600 } .failed { color: #b42318; font-weight: 600 }
.note { color: #57606a } img.plot { max-width: 100% } code { background: #f3f5f7; padding: .1rem .3rem }
"""


def report_html(
    pictures: Mapping[str, tuple[str, Mapping[str, bytes]]],
    parity: Sequence[tuple[str, ParityReport]],
    bench: BenchReport,
    forms: FormsReport,
    plot_png: bytes,
    versions: Mapping[str, str],
) -> str:
    """The report of a demo.

    Args:
        pictures: adapter → (its description, row's name → PNG).
        parity: pairs of what was checked and its report.
        bench: the latencies, with `plot_png` as their plot.
        forms: what each form of the model costs.
        versions: of the packages used.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>trexport demo</title>",
        f"<style>{_STYLE}</style>",
        "<h1>trained adapter → merged UNet → ONNX → proved equal → measured</h1>",
        "<p>A small diffusion model of handwritten digits and its adapters, all trained (see <code>examples/digits</code>),"
        " through the whole line on this machine. Every row of a block starts from the same noise.</p>",
        "<h2>Pictures</h2>",
        *(_pictures(name, description, rows) for name, (description, rows) in pictures.items()),
        "<h2>Parity</h2>",
        "<p>Against float32 PyTorch with the adapters attached and never merged: the worst of several timesteps, seeds and"
        " shapes, and the final image of a whole trajectory.</p>",
        _parity(parity),
        "<h2>Latency</h2>",
        f"<img class=plot alt='latency of each backend' src='{data_url(plot_png)}'>",
        _bench(bench),
        "<h2>Which form</h2>",
        _forms(forms),
        "<h2>Made with</h2>",
        f"<p class=note>{escape(', '.join(f'{name} {version}' for name, version in versions.items()))}</p>",
    ]
    return "\n".join(parts) + "\n"


def _pictures(name: str, description: str, rows: Mapping[str, bytes]) -> str:
    lines = "".join(
        f"<tr><td>{escape(row)}</td><td><img alt='{escape(name)}, {escape(row)}' src='{data_url(png)}'></td></tr>"
        for row, png in rows.items()
    )
    return f"<h3>{escape(name)}</h3><p>{escape(description)}</p><table class=pictures>{lines}</table>"


def _parity(reports: Sequence[tuple[str, ParityReport]]) -> str:
    head = ["artifact", "worst relative L2", "limit", "effect", "final image, relative L2", "PSNR dB", ""]
    rows = []
    for name, report in reports:
        worst, trajectory = report.worst, report.trajectory
        verdict = "<span class=passed>passed</span>" if report.passed else "<span class=failed>failed</span>"
        rows.append(
            [
                escape(name),
                f"{worst.relative_l2:.2e}",
                f"{report.tolerance.relative_l2:g}",
                f"{max(step.effect for step in report.steps):.3f}",
                f"{trajectory.relative_l2:.2e}" if trajectory else "",
                f"{trajectory.psnr_db:.1f}" if trajectory else "",
                verdict,
            ]
        )
    failures = [f"{name}: {failure}" for name, report in reports for failure in report.failures]
    notes = "".join(f"<p class=failed>{escape(failure)}</p>" for failure in failures)
    return _table(head, rows) + notes


def _bench(report: BenchReport) -> str:
    head = ["backend", "median ms", "p10", "p90", "n", "ratio", "share of the roofline", "peak memory MB"]
    rows = [
        [
            escape(result.backend),
            f"{result.latency.median_ms:.2f}",
            f"{result.latency.p10_ms:.2f}",
            f"{result.latency.p90_ms:.2f}",
            str(result.latency.n),
            f"{result.ratio:.2f}",
            f"{result.roofline_share:.1%}",
            f"{result.peak_memory_bytes / 1e6:.0f}",
        ]
        for result in report.results
    ]
    environment = report.environment
    sizes = ", ".join(f"{axis} {size}" for axis, size in report.sizes.items())
    note = (
        f"{environment.get('gpu', environment['cpu'])}, {environment['torch_threads']} threads; {sizes}; {report.dtype}"
    )
    skipped = "".join(f"<p class=note>skipped {escape(k)}: {escape(v)}</p>" for k, v in report.skipped.items())
    return _table(head, rows) + f"<p class=note>{escape(note)}</p>" + skipped


def _forms(report: FormsReport) -> str:
    head = ["form", "step ms", "swap ms", "model MB", "each adapter MB", "smaller than merged models from n adapters"]
    rows = [
        [
            escape(cost.form),
            f"{cost.step_ms:.2f}",
            f"{cost.swap_ms:.2f}",
            f"{cost.model_bytes / 1e6:.1f}",
            f"{cost.adapter_bytes / 1e6:.2f}",
            str(report.adapters.get(cost.form, "")),
        ]
        for cost in report.costs
    ]
    wins = [f"from {swaps:,.0f} swaps an hour on: {escape(form)}" for swaps, form in report.winners]
    return _table(head, rows) + f"<p class=note>Most steps on a busy device, {'; '.join(wins)}.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"
