"""AOTInductor at the size of Stable Diffusion 1.5 on a GPU, fp16: a step, a build, a swap, a session's promises; beside
ONNX Runtime where that is.

BENCH_LEVEL is `--optimization-level`, BENCH_DTYPE fp16 or bf16, BENCH_BASE random:sd15 or random:sdxl. For a try on another
machine: BENCH_BASE (random:tiny), BENCH_DEVICE (cpu), BENCH_DTYPE (fp32), BENCH_TMP.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from benchmarks.changing import changing
from benchmarks.engines import build_all
from benchmarks.forms_gpu import switch
from benchmarks.forms_sd15 import ADAPTER
from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import BACKENDS, Device, EngineFile, OnnxFile
from trexport.bench.forms import cost_of, file_for, report_forms
from trexport.bench.run import BenchOptions, bench
from trexport.graph.export import ExportOptions
from trexport.graph.swappable import SwappableOptions
from trexport.io_spec import Dtype
from trexport.models.adapters import open_adapters
from trexport.models.architectures import default_sizes
from trexport.models.base import Base, open_base
from trexport.parity.validate import ValidateOptions, validate

FORMS: dict[str, dict[str, Any]] = {"merged": {}, "swappable": {"swappable": SwappableOptions()}}


def main() -> None:
    """Export, compile, prove, switch, measure, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    level = int(os.environ.get("BENCH_LEVEL", "0"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        base = open_base(str(write_base(Path(name) / "base", source)))
        fields = run(base, Path(name), device, dtype, level)
    if source in ("random:sd15", "random:sdxl") and device == "cuda":
        about = {"base": source, "adapter": ADAPTER, "optimization_level": level}
        name = "engine_gpu" + ("_sdxl" if source == "random:sdxl" else "")
        name += f"_{dtype}" + (f"_level{level}" if level else "")
        variables = f"BENCH_LEVEL={level} BENCH_DTYPE={dtype} BENCH_BASE={source}"
        keep(name, f"python -m benchmarks engine-gpu  # {variables}", device, about | fields)


def run(base: Base, folder: Path, device: Device, dtype: Dtype, level: int) -> dict[str, Any]:
    """Both forms of one base."""
    adapters = open_adapters([ADAPTER], base)
    fixed = default_sizes(base.config)
    assert base.folder is not None
    exports = {form: ExportOptions(dtype, fixed=fixed, **options) for form, options in FORMS.items()}
    fields: dict[str, Any] = {"build": build_all(base.folder, folder, exports, device, level), "parity": {}}
    engines = {form: open_artifact(folder / form, verify=False) for form in FORMS}
    onnx: dict[str, OnnxFile] = {}
    if BACKENDS["onnxruntime"].availability(device).ok:
        exported = open_artifact(folder / "onnx-merged", verify=False)
        onnx[""] = OnnxFile(exported.onnx_path, exported.manifest.io)
    for form, engine in engines.items():
        checks = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=0, locate=False)
        parity = validate(engine, base, adapters, device, checks)
        fields["parity"][form] = {"passed": parity.passed, "relative_l2": [s.relative_l2 for s in parity.steps]}
        print(f"{form}: parity {parity.passed} {parity.failures} {fields['parity'][form]['relative_l2']}", flush=True)
    fields["switching"] = switch(folder / "swappable", device)
    print(f"switching: {fields['switching']}", flush=True)
    fields["changing"] = changing(base, folder / "merged", folder / "swappable", folder, device)
    print(f"an adapter before every step: {fields['changing']}", flush=True)
    files = {form: file_for(artifact, adapters, device) for form, artifact in engines.items()}
    labelled = {f"aotinductor, {form}": file for form, file in files.items() if isinstance(file, EngineFile)}
    options = BenchOptions(dtype=dtype, warm_up=5, iterations=60)
    report = bench(base, adapters, onnx, device, options, engines=labelled)
    results = {result.backend: result for result in report.results}
    for result in report.results:
        latency = result.latency
        print(
            f"{result.backend:24} {latency.median_ms:8.3f} ms, p10 {latency.p10_ms:.3f}, p90 {latency.p90_ms:.3f}, "
            f"ratio {result.ratio:.3f}, load {result.load_seconds:.1f} s, {result.peak_memory_bytes / 2**30:.1f} GiB, "
            f"relative L2 {result.relative_l2:.1e} {result.note or ''}"
        )
    print(report.skipped)
    del files, labelled
    costs = [cost_of(artifact, adapters, device, results[f"aotinductor, {form}"]) for form, artifact in engines.items()]
    for cost in costs:
        print(cost, flush=True)
    return fields | {"bench": report.to_dict(), "forms": asdict(report_forms(costs))}
