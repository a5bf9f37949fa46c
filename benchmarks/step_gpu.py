"""One UNet step of Stable Diffusion 1.5's architecture on a GPU: eager, compiled, ONNX Runtime, all with CUDA graphs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import OnnxFile
from trexport.bench.run import BenchOptions, bench
from trexport.errors import MissingError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.io_spec import Dtype
from trexport.models.adapters import open_adapters
from trexport.models.architectures import default_sizes
from trexport.models.base import open_base
from trexport.parity.validate import ValidateOptions, validate

ADAPTER = "random:tlora:2:6"
CASES: tuple[tuple[Dtype, int | None], ...] = (("fp16", None), ("fp16", 23), ("bf16", None), ("fp32", None))


def main() -> None:
    """Every precision with its own opset, and fp16 with opset 23, whose parity is known to be in doubt."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        # from a file, whose weights are read faster than random ones are made
        base = write_base(Path(name) / "sd15", "random:sd15")
        for dtype, opset in CASES:
            fields = run(base, dtype, opset, Path(name) / "onnx")
            shutil.rmtree(Path(name) / "onnx")
            label = f"step_gpu_{dtype}" + (f"_opset{opset}" if opset else "")
            keep(label, "python -m benchmarks step-gpu", "cuda", fields)


def run(source: Path, dtype: Dtype, opset: int | None, folder: Path) -> dict[str, Any]:
    """Export, check, measure."""
    base = open_base(str(source))
    adapters = open_adapters([ADAPTER], base)
    manifest = export_onnx(base, adapters, folder, ExportOptions(dtype, opset, default_sizes(base.config)))
    artifact = open_artifact(folder, verify=False)
    print(f"{dtype}, opset {manifest.opset}:")
    try:
        options = ValidateOptions(timesteps=(1, 500, 999), seeds=(0,), trajectory_steps=10)
        parity = dataclasses.replace(validate(artifact, base, adapters, "cuda", options), artifact="random:sd15")
        verdict = parity.to_dict()
        print(f"  parity {'passed' if parity.passed else parity.failures}")
        print(f"  relative L2 {[f'{step.relative_l2:.2e}' for step in parity.steps]}, trajectory {parity.trajectory}")
        if parity.first_deviation or parity.location_note:
            print(f"  {parity.first_deviation} {parity.location_note or ''}")
    except MissingError as error:
        verdict = {"passed": None, "skipped": str(error)}
        print(f"  parity skipped: {error}")
    onnx = OnnxFile(artifact.onnx_path, artifact.manifest.io)
    report = bench(base, adapters, {"": onnx}, "cuda", BenchOptions(dtype=dtype, warm_up=5, iterations=60))
    for result in report.results:
        latency = result.latency
        print(
            f"  {result.backend:14} {latency.median_ms:8.3f} ms  p10 {latency.p10_ms:.3f} p90 {latency.p90_ms:.3f}  "
            f"ratio {result.ratio:.3f}  roofline {result.roofline_share:.1%}  load {result.load_seconds:.0f} s  "
            f"{result.peak_memory_bytes / 2**30:.1f} GiB  relative L2 {result.relative_l2:.1e}"
        )
        if result.note:
            print(f"    {result.note}")
    for name, reason in report.skipped.items():
        print(f"  skipped {name}: {reason}")
    print(f"  ceiling {report.ceiling}, at least {report.least_ms:.2f} ms", flush=True)
    return {
        "base": "random:sd15",
        "opset": manifest.opset,
        "adapter": ADAPTER,
        "parity": verdict,
        "bench": report.to_dict() | {"model": "random:sd15"},
    }
