"""The factored form at the size of Stable Diffusion 1.5 on a CPU: a step against the merged form's, size, parity."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.child import run_in_child
from benchmarks.merge_sd15 import ADAPTER, write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import BACKENDS, OnnxFile
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.io_spec import default_sizes
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base
from trexport.models.unet import random_feeds
from trexport.parity.metrics import relative_l2

ITERATIONS = int(os.environ.get("BENCH_ITERATIONS", "9"))


def main() -> None:
    """Export both forms, run them side by side, keep."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        base = write_base(folder / "base", "random:sd15")
        forms = {form: folder / form for form in ("merged", "factored")}
        for form, out in forms.items():
            run_in_child(run_export, base, out, form == "factored")
        fields = run_in_child(run_steps, forms).value
    for form, ratio in fields["ratio"].items():
        print(f"{form:32} {fields['latency'][form]['median_ms']:9.0f} ms  ÷ merged {ratio:.3f}")
    print({key: value for key, value in fields.items() if key not in ("latency", "ratio", "milliseconds")})
    head = {"base": "random:sd15, fp32", "adapter": ADAPTER, "sizes": "2×64×64, 77 tokens"}
    keep("factored_sd15", "python -m benchmarks factored", "cpu", head | fields)


def run_export(base: Path, out: Path, factored: bool) -> None:
    """One static export."""
    opened = open_base(str(base))
    kept = FactoredOptions() if factored else None
    options = ExportOptions(fixed=default_sizes(opened.config), factored=kept)
    export_onnx(opened, open_adapters([ADAPTER], opened), out, options)


def run_steps(folders: dict[str, Path]) -> dict[str, Any]:
    """The forms in ONNX Runtime, interleaved."""
    artifacts = {form: open_artifact(folder, verify=False) for form, folder in folders.items()}
    feeds = random_feeds(artifacts["merged"].manifest.io, {})
    steps = {
        form: BACKENDS["onnxruntime"].load(OnnxFile(a.onnx_path, a.manifest.io), "cpu").step(feeds)
        for form, a in artifacts.items()
    }
    milliseconds = time_steps(steps, "cpu", warm_up=1, iterations=ITERATIONS)
    latency = {form: Latency.of(values) for form, values in milliseconds.items()}
    outputs: dict[str, torch.Tensor] = {form: step.outputs["out_sample"] for form, step in steps.items()}
    sizes = {form: sum(file.stat().st_size for file in folder.glob("unet/*")) for form, folder in folders.items()}
    plan = artifacts["factored"].manifest.factored
    assert plan is not None
    return {
        "latency": {form: vars(found) for form, found in latency.items()},
        "ratio": {form: found.median_ms / latency["merged"].median_ms for form, found in latency.items()},
        "milliseconds": milliseconds,
        "relative_l2_to_merged": {form: relative_l2(out, outputs["merged"]) for form, out in outputs.items()},
        "size_bytes": sizes,
        "beyond_the_base_bytes": sizes["factored"] - sizes["merged"],
        "plan": dict(Counter(layer["path"] for layer in plan["plan"].values())),
    }
