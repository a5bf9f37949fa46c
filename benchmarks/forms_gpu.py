"""The forms at the size of Stable Diffusion 1.5 on a GPU in ONNX Runtime, fp16: a step, a swap, a session's promises."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.forms_sd15 import ADAPTER
from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import Device, OnnxFile
from trexport.bench.forms import cost_of, file_for, report_forms
from trexport.bench.run import BenchOptions, bench
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.architectures import default_sizes
from trexport.models.base import Base, open_base
from trexport.models.model import random_feeds
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session

OTHER = "random:tlora:1:4"
FORMS: dict[str, dict[str, Any]] = {
    "merged": {},
    "factored": {"factored": FactoredOptions(blank=True, plan_for="cuda")},
    "bank": {"factored": FactoredOptions(bank=2, plan_for="cuda")},
    "swappable": {"swappable": SwappableOptions()},
}


def main() -> None:
    """Export, prove, switch, measure, keep."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        source = os.environ.get("BENCH_BASE", "random:sd15")
        base = open_base(str(write_base(Path(name) / "sd15", source)))
        fields = run(base, Path(name))
        keep(
            "forms_gpu_fp16",
            "python -m benchmarks forms-gpu",
            "cuda",
            {"base": "random:sd15", "adapter": ADAPTER} | fields,
        )


def run(base: Base, folder: Path) -> dict[str, Any]:
    """All forms of one base."""
    adapters = open_adapters([ADAPTER], base)
    fields: dict[str, Any] = {"parity": {}, "switching": {}}
    checked = os.environ.get("BENCH_CHECKS") != "0"
    if not checked:
        fields["note"] = "latencies only: parity and switching were left out of this run (BENCH_CHECKS=0)"
    for form, options in FORMS.items():
        export_onnx(base, adapters, folder / form, ExportOptions("fp16", fixed=default_sizes(base.config), **options))
        artifact = open_artifact(folder / form, verify=False)
        if not checked:
            continue
        checks = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=0, locate=False)
        report = validate(artifact, base, adapters, "cuda", checks)
        fields["parity"][form] = {"passed": report.passed, "relative_l2": [s.relative_l2 for s in report.steps]}
        print(f"{form}: parity {report.passed} {report.failures} {fields['parity'][form]['relative_l2']}", flush=True)
        if form != "merged":
            fields["switching"][form] = switch(folder / form)
            print(f"{form}: {fields['switching'][form]}", flush=True)
    artifacts = {form: open_artifact(folder / form, verify=False) for form in FORMS}
    files = {form: file_for(artifact, adapters, "cuda") for form, artifact in artifacts.items()}
    onnx = {form: file for form, file in files.items() if isinstance(file, OnnxFile)}
    report = bench(base, adapters, onnx, "cuda", BenchOptions(dtype="fp16", warm_up=5, iterations=60))
    results = {result.backend: result for result in report.results}
    for result in report.results:
        print(
            f"{result.backend:24} {result.latency.median_ms:8.3f} ms, p10 {result.latency.p10_ms:.3f}, "
            f"p90 {result.latency.p90_ms:.3f}, relative L2 {result.relative_l2:.1e} {result.note or ''}"
        )
    print(report.skipped)
    del files
    costs = [cost_of(a, adapters, "cuda", results[f"onnxruntime, {form}"]) for form, a in artifacts.items()]
    for cost in costs:
        print(cost, flush=True)
    return fields | {"bench": report.to_dict(), "forms": asdict(report_forms(costs))}


def switch(folder: Path, device: Device = "cuda") -> dict[str, bool]:
    """Whether a session keeps its word on this device: A → B → A has A's bits, off the base's, after twenty swaps too; and
    whether the runtime itself gives the same bits twice."""
    with Session(folder, device, verify=False) as session:
        session.load_adapter("a", ADAPTER)
        session.load_adapter("b", OTHER)
        feeds = random_feeds(session.spec, {}, seed=1)

        def drawn() -> Tensor:
            return session.run(feeds)["out_sample"].cpu()

        off = drawn()
        repeats = torch.equal(drawn(), off)
        session.activate({"a": 0.7})
        a = drawn()
        for round_ in range(20):
            session.activate({"ab"[round_ % 2]: 0.1 * round_})
        session.activate({"b": 1.0})
        b = drawn()
        session.activate({"a": 0.7})
        again = drawn()
        session.deactivate()
        return {
            "repeats": repeats,
            "a_again": torch.equal(again, a),
            "off_again": torch.equal(drawn(), off),
            "differ": not torch.equal(a, b) and not torch.equal(a, off),
        }
