"""`trexport engine --backend tensorrt-rtx` at the size of Stable Diffusion 1.5, on a machine without a GPU: seconds, size,
memory. What comes out is not run here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.child import run_in_child
from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import EngineOptions, engine_backend_of
from trexport.engine import build_engine, usual_sizes
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base
from trexport.profile import Profile

ADAPTER = "random:tlora:2:6"
TARGETS = ("sm80", "sm86", "sm89", "sm120")
FORMS = {
    "merged": ExportOptions("fp16"),
    "swappable": ExportOptions("fp16", swappable=SwappableOptions()),
    "factored": ExportOptions("fp16", factored=FactoredOptions(plan_for="cuda")),
    "bank of 8": ExportOptions("fp16", factored=FactoredOptions(bank=8, plan_for="cuda")),
}


def main() -> None:
    """Every form, in float16, batch 1 to 8, the usual size 2."""
    fields: dict[str, Any] = {"base": "random:sd15", "adapter": ADAPTER, "dtype": "fp16", "targets": TARGETS}
    fields["note"] = "built on a CPU, not executed: TensorRT-RTX runs on none of the GPUs that the project measures on"
    fields["forms"] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        base = write_base(folder / "base", os.environ.get("BENCH_BASE", "random:sd15"))
        for form in os.environ.get("BENCH_FORMS", ",".join(FORMS)).split(","):
            run_in_child(run_export, base, folder / "onnx", form)
            built = run_in_child(run_build, folder / "onnx", folder / "engine")
            weights = open_base(str(base)).size_bytes
            fields["forms"][form] = built.value | {"peak_private_bytes": built.peak_private_bytes}
            print(
                f"{form:10} built in {built.value['seconds']:.1f} s, {built.value['size_bytes'] / 1e9:.3f} GB, "
                f"private memory at most {built.peak_private_bytes / 1e9:.2f} GB (float32 weights: {weights / 1e9:.2f})",
                flush=True,
            )
            shutil.rmtree(folder / "onnx")
            shutil.rmtree(folder / "engine")
            # a bank takes long: keep what there is
            keep("engine_rtx", "python -m benchmarks engine-rtx", "cpu", fields)


def run_export(source: Path, folder: Path, form: str) -> None:
    """The ONNX artifact of a form."""
    base = open_base(str(source))
    export_onnx(base, open_adapters([ADAPTER], base), folder, FORMS[form])


def run_build(onnx: Path, out: Path) -> dict[str, Any]:
    """The engine of it."""
    artifact = open_artifact(onnx, verify=False)
    base, adapters = artifact.sources()
    sizes = usual_sizes(artifact, base)
    profile = Profile({**sizes, "batch_size": 1}, sizes, {**sizes, "batch_size": 8})
    backend = engine_backend_of("tensorrt-rtx")
    result = build_engine(artifact, base, adapters, out, backend, EngineOptions((profile,), TARGETS))
    assert result is not None
    manifest, report = result
    assert manifest.engine is not None
    return {
        "seconds": report.seconds,
        "size_bytes": report.size_bytes,
        "profile": str(profile),
        "inputs": len(manifest.engine["settings"]["inputs"]),
        "runtime": manifest.engine["runtime"],
        "network_layers": len(report.layers),
    }
