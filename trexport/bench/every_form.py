"""Every form of a base with adapters, made and measured in one run: what adapters cost a user on this device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, Device, EngineFile, EngineOptions, OnnxFile, engine_backend_of
from trexport.bench.forms import FormCost, FormsReport, cost_of, file_for, report_forms
from trexport.bench.report import BackendResult, BenchReport
from trexport.bench.run import BenchOptions, bench
from trexport.engine import build_engine, default_profile
from trexport.errors import UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.io_spec import BYTES_OF
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import default_sizes
from trexport.models.base import Base
from trexport.progress import SILENT, Progress

TORCH, COMPILED, ONNX, ENGINE = "torch", "torch-compile", "onnxruntime", "aotinductor"


@final
@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    value: float
    unit: str
    """`ms`, or nothing for a ratio."""
    roofline_share: float | None = None
    """The least time that the device allows over the measured one."""


@final
@dataclass(frozen=True)
class EveryForm:
    """What was measured."""

    rows: Sequence[Row]
    steps: BenchReport
    batch: BenchReport
    """A bank with another adapter for every sample, beside the merged model with as many samples."""
    forms: FormsReport
    left_out: Mapping[str, str]
    """Row → why it is not there."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_every_form(
    base: Base,
    adapters: Sequence[BoundAdapter],
    device: Device,
    folder: Path,
    options: BenchOptions,
    *,
    bank: int = 8,
    progress: Progress = SILENT,
) -> EveryForm:
    """Export every form, build the engines, measure all of it.

    Args:
        adapters: one at least; a bank holds the first one in every place.
        folder: for what is built, some times the size of the model.
        options: `backends` is not looked at.
        bank: adapters in one batch.

    Raises:
        UsageError: no adapter.
    """
    if not adapters:
        raise UsageError("no adapter given; what adapters cost is measured with one")
    left_out: dict[str, str] = {}
    sizes = default_sizes(base.config) | base.architecture.sizes(options.sizes or {})
    forms: dict[str, dict[str, Any]] = {
        "merged": {},
        "factored": {"factored": FactoredOptions(blank=True, plan_for=device)},
        "swappable": {"swappable": SwappableOptions()},
    }
    artifacts: dict[str, Artifact] = {}
    for form, fields in forms.items():
        export = ExportOptions(options.dtype, fixed=sizes, **fields)
        artifacts[form] = _exported(base, adapters, folder / form, export, progress)
    engines = {
        form: _built(artifacts[form], base, adapters, folder, device, progress) for form in ("merged", "swappable")
    }
    onnx = {"merged": artifacts["merged"], "factored": artifacts["factored"]}
    available = BACKENDS[ONNX].availability(device)
    if not available.ok:
        left_out[ONNX] = available.reason or "not here"
        onnx = {}
    steps, costs = _steps(base, adapters, onnx, engines, device, options, progress)
    # on a CPU two more engines would take minutes to say what ONNX Runtime says
    backends = [*([ONNX] if onnx else []), *([ENGINE] if device == "cuda" or not onnx else [])]
    batch = _batch(base, adapters[0], bank, folder, device, backends, options, sizes, progress)
    report = report_forms(list(costs.values()))
    return EveryForm(_rows(steps, batch, costs, engines["swappable"], bank), steps, batch, report, left_out)


def _exported(
    base: Base, adapters: Sequence[BoundAdapter], folder: Path, options: ExportOptions, progress: Progress
) -> Artifact:
    export_onnx(base, adapters, folder, options, progress=progress)
    return open_artifact(folder, verify=False)


def _built(
    artifact: Artifact, base: Base, adapters: Sequence[BoundAdapter], folder: Path, device: Device, progress: Progress
) -> Artifact:
    out = folder / f"{artifact.folder.name}-engine"
    level = 1 if base.architecture.rewritable else None  # 1 takes no longer to build
    options = EngineOptions((default_profile(artifact, base),), device=device, optimization_level=level)
    build_engine(artifact, base, adapters, out, engine_backend_of(ENGINE), options, progress=progress)
    return open_artifact(out, verify=False)


def _steps(
    base: Base,
    adapters: Sequence[BoundAdapter],
    onnx: Mapping[str, Artifact],
    engines: Mapping[str, Artifact],
    device: Device,
    options: BenchOptions,
    progress: Progress,
) -> tuple[BenchReport, dict[str, FormCost]]:
    """All steps side by side, and what the forms cost."""
    files = {form: file_for(artifact, adapters, device) for form, artifact in onnx.items()}
    built = {f"{ENGINE}, {form}": file_for(artifact, adapters, device) for form, artifact in engines.items()}
    report = bench(
        base,
        adapters,
        {form: file for form, file in files.items() if isinstance(file, OnnxFile)},
        device,
        replace(options, backends=(TORCH, COMPILED, ENGINE, *((ONNX,) if files else ()))),
        engines={label: file for label, file in built.items() if isinstance(file, EngineFile)},
        progress=progress,
    )
    del files, built
    results = {result.backend: result for result in report.results}
    measured = {f"{ONNX}, {form}": artifact for form, artifact in onnx.items()}
    measured |= {f"{ENGINE}, {form}": artifact for form, artifact in engines.items()}
    costs = {
        label: replace(cost_of(artifact, adapters, device, results[label]), form=label)
        for label, artifact in measured.items()
        if label in results
    }
    return report, costs


def _batch(
    base: Base,
    adapter: BoundAdapter,
    bank: int,
    folder: Path,
    device: Device,
    backends: Sequence[str],
    options: BenchOptions,
    sizes: Mapping[str, int],
    progress: Progress,
) -> BenchReport:
    """A batch with another adapter for each sample, and the plain batch. The same cores lie in every place: what a place
    holds does not change what it costs."""
    fixed = dict(sizes) | {"batch_size": bank}
    places = [replace(adapter, name=f"{adapter.name} {place}") for place in range(1, bank + 1)]
    of_bank = FactoredOptions(blank=True, bank=bank, plan_for=device)
    onnx: dict[str, OnnxFile] = {}
    engines: dict[str, EngineFile] = {}
    for form, factored, held in (("merged", None, [adapter]), (_bank_of(bank), of_bank, places)):
        export = ExportOptions(options.dtype, fixed=fixed, factored=factored)
        artifact = _exported(base, [adapter], folder / f"{form} in a batch", export, progress)
        if ONNX in backends:
            file = file_for(artifact, held, device, range(len(held)))
            assert isinstance(file, OnnxFile)
            onnx[form] = file
        if ENGINE in backends:
            engine = _built(artifact, base, [adapter], folder, device, progress)
            built = file_for(engine, held, device, range(len(held)))
            assert isinstance(built, EngineFile)
            engines[f"{ENGINE}, {form}"] = built
    options = replace(options, backends=backends, sizes=fixed)
    return bench(base, [adapter], onnx, device, options, engines=engines, progress=progress)


def _bank_of(bank: int) -> str:
    return f"bank of {bank}"


def _rows(
    steps: BenchReport, batch: BenchReport, costs: Mapping[str, FormCost], swappable: Artifact, bank: int
) -> list[Row]:
    """The table's lines, of what is there."""
    found = {result.backend: result for result in steps.results}
    rows = [
        Row(f"step, {name}", result.latency.median_ms, "ms", result.roofline_share) for name, result in found.items()
    ]
    pairs = [
        (f"{ENGINE}, merged", COMPILED),
        (f"{ENGINE}, swappable", f"{ENGINE}, merged"),
        (f"{ONNX}, merged", f"{ENGINE}, merged"),
        (f"{ONNX}, factored", f"{ONNX}, merged"),
    ]
    rows += [Row(f"{a} ÷ {b}", _ratio(found[a], found[b]), "") for a, b in pairs if a in found and b in found]
    many = {result.backend: result for result in batch.results}
    rows += [
        Row(
            f"{backend}, a batch of {bank} with {bank} adapters ÷ merged",
            _ratio(many[f"{backend}, {_bank_of(bank)}"], many[f"{backend}, merged"]),
            "",
        )
        for backend in (ENGINE, ONNX)
        if {f"{backend}, merged", f"{backend}, {_bank_of(bank)}"} <= many.keys()
    ]
    label = f"{ENGINE}, swappable"
    if label in costs:
        moved = 2 * sum(math.prod(shape) for shape in swappable.engine_record.layers.values()) * BYTES_OF[steps.dtype]
        least = 1e3 * moved / steps.ceiling.bytes_per_second / costs[label].swap_ms
        rows.append(Row("swap of all adapted weights", costs[label].swap_ms, "ms", least))
        plain = found.get(f"{ENGINE}, merged")
        if plain is not None:
            both = found[label].latency.median_ms + costs[label].swap_ms
            rows.append(Row(f"({label} + a swap) ÷ {plain.backend}", both / plain.latency.median_ms, ""))
    return rows


def _ratio(of: BackendResult, to: BackendResult) -> float:
    return of.latency.median_ms / to.latency.median_ms
