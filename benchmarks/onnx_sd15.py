"""`trexport onnx` at the size of Stable Diffusion 1.5 on a CPU: seconds, memory, parity, and a step against torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.child import run_in_child
from benchmarks.merge_sd15 import ADAPTER, write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import OnnxFile
from trexport.bench.run import BenchOptions, bench
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.adapters import open_adapters
from trexport.models.architectures import default_sizes
from trexport.models.base import open_base
from trexport.parity.validate import ValidateOptions, validate


def main() -> None:
    """Export from a folder, check, measure, keep."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        base = write_base(folder / "base", "random:sd15")
        weights_bytes = open_base(str(base)).size_bytes
        exported = run_in_child(run_export, base, folder / "onnx")
        print(
            f"export {exported.seconds:.1f} s, resident at most {exported.peak_resident_bytes / weights_bytes:.2f} × the "
            f"weights, private {exported.peak_private_bytes / weights_bytes:.2f} ×"
        )
        parity = run_in_child(run_validate, folder / "onnx").value
        print(f"parity: {parity}")
        steps = run_in_child(run_bench, folder / "onnx").value
        for result in steps["results"]:
            print(f"{result['backend']:12} {result['latency']['median_ms']:9.0f} ms  ratio {result['ratio']:.3f}")
        fields: dict[str, Any] = {
            "base": "random:sd15, fp32",
            "adapter": ADAPTER,
            "weights_bytes": weights_bytes,
            "export_seconds": exported.seconds,
            "export_peak_resident_bytes": exported.peak_resident_bytes,
            "export_peak_private_bytes": exported.peak_private_bytes,
            "export_peak_over_weights": exported.peak_resident_bytes / weights_bytes,
            "parity": parity,
            "step": steps,
        }
    keep("onnx_sd15", "python -m benchmarks onnx", "cpu", fields)


def run_export(base: Path, out: Path) -> None:
    """One export, static at the UNet's own sizes."""
    opened = open_base(str(base))
    options = ExportOptions(fixed=default_sizes(opened.config))
    export_onnx(opened, open_adapters([ADAPTER], opened), out, options)


def run_validate(folder: Path) -> dict[str, Any]:
    """Single steps against torch; a trajectory of this size would take ten minutes."""
    artifact = open_artifact(folder)
    base, adapters = artifact.sources()
    options = ValidateOptions(timesteps=(1, 500, 999), seeds=(0,), trajectory_steps=0)
    report = validate(artifact, base, adapters, "cpu", options)
    return {
        "passed": report.passed,
        "failures": list(report.failures),
        "relative_l2": [step.relative_l2 for step in report.steps],
        "effect": [step.effect for step in report.steps],
    }


def run_bench(folder: Path) -> dict[str, Any]:
    """torch and ONNX Runtime, interleaved."""
    artifact = open_artifact(folder)
    base, adapters = artifact.sources()
    options = BenchOptions(backends=("torch", "onnxruntime"), warm_up=1, iterations=5)
    onnx = OnnxFile(artifact.onnx_path, artifact.manifest.io)
    return bench(base, adapters, {"": onnx}, "cpu", options).to_dict()
