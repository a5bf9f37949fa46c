"""What a benchmark found, and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from trexport.bench.roofline import Ceiling, Work
from trexport.bench.stats import Latency
from trexport.io_spec import Dtype


@final
@dataclass(frozen=True)
class BackendResult:
    """One backend's latency of one step."""

    backend: str
    latency: Latency
    ratio: float
    """Its median over the first backend's."""
    roofline_share: float
    """The least time the device allows over the median: 1 could not be faster."""
    load_seconds: float
    """Building, compiling, capturing; the first step included."""
    peak_memory_bytes: int
    """Above what was in use before it was loaded, loading included."""
    relative_l2: float
    """Of its output to that of eager torch in float32, so that nobody is fast by being wrong."""
    note: str | None = None
    """What whoever reads the latency must know."""


@final
@dataclass(frozen=True)
class BenchReport:
    """Latencies of several backends, from one run."""

    model: str
    adapters: Sequence[str]
    dtype: Dtype
    sizes: Mapping[str, int]
    results: Sequence[BackendResult]
    work: Work
    ceiling: Ceiling
    least_ms: float
    environment: Mapping[str, Any]
    skipped: Mapping[str, str]
    """Backends that could not run here, and why."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plot(report: BenchReport, path: Path) -> None:
    """A bar for each backend: the median, whiskers from p10 to p90, the roofline as a line. PNG or SVG by suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.55 * len(report.results)), layout="constrained")
    axes = figure.subplots()
    names = [result.backend for result in report.results]
    medians = [result.latency.median_ms for result in report.results]
    low = [max(0.0, result.latency.median_ms - result.latency.p10_ms) for result in report.results]
    high = [max(0.0, result.latency.p90_ms - result.latency.median_ms) for result in report.results]
    bars = axes.barh(names, medians, xerr=[low, high], color="#4878a8", ecolor="#333333", capsize=3, height=0.6)
    axes.bar_label(bars, [f"{r.latency.median_ms:.3g} ms ({r.ratio:.2f}×)" for r in report.results], padding=6)
    axes.axvline(report.least_ms, color="#b04030", linestyle="--", linewidth=1, label="roofline of this device")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(result.latency.p90_ms for result in report.results))
    axes.set_xlabel("one step, ms (median, p10 to p90)")
    axes.set_title(
        f"{report.model}, {report.dtype}, {report.environment.get('gpu', report.environment['cpu'])}", fontsize=9
    )
    figure.legend(fontsize=8, loc="outside lower right")
    figure.savefig(path, dpi=150)
