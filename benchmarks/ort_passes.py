"""What each graph pass gains in ONNX Runtime, on one UNet step of Stable Diffusion 1.5's architecture on a GPU, fp16.

For a try on another machine: BENCH_BASE (random:tiny), BENCH_DEVICE (cpu, with the passes whose operators it has),
BENCH_DTYPE (fp32), BENCH_TMP. BENCH_ONLY (a part of their labels, several with commas) leaves rows out, ORT_PROFILE=1 adds
what each kind of node takes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, final

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import Device, OnnxFile, Step
from trexport.backends.onnxruntime import OnnxRuntime, bound_run, open_session
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.errors import TrexportError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.ort_graph import PASSES, ort_graph
from trexport.io_spec import Dtype
from trexport.models.architectures import default_sizes
from trexport.models.base import Base, open_base
from trexport.models.model import DTYPES, random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.reference import Reference

ON_CPU = ("neutral", "multi_head_attention", "skip_layer_norm")
_TOGETHER = ("nhwc_conv", "transposes")
_ALONE = ("joined_products", "pointwise", "layer_norm")
"""Whose gain depends on what runs after them: left out of all."""
_TOP = 25


@final
@dataclass(frozen=True)
class Row:
    """One way to run the same file."""

    label: str
    passes: tuple[str, ...]
    provider: Mapping[str, str] = field(default_factory=dict)


def rows(device: Device) -> list[Row]:
    """The file as it is, each pass on top of those before it, and what options of the provider change then."""
    found = [Row("as exported", ())]
    if device == "cuda":
        found.append(Row("as exported, biases fused", (), {"fuse_conv_bias": "1"}))
    chosen: tuple[str, ...] = ()
    for name in PASSES if device == "cuda" else ON_CPU:
        chosen += (name,)
        if name != _TOGETHER[0]:  # transposes around every convolution, before those are gone, tell nothing
            label = " and ".join(_TOGETHER) if name == _TOGETHER[1] else name
            found.append(Row(f"+ {label}", chosen))
    if device == "cuda":
        found += [Row(f"all but {name}", tuple(other for other in chosen if other != name)) for name in _ALONE]
        found += [
            Row("all, biases of convolutions fused", chosen, {"fuse_conv_bias": "1"}),
            Row("all, layer norms summed in half", chosen, {"enable_skip_layer_norm_strict_mode": "0"}),
            Row("all, search for convolutions", chosen, {"cudnn_conv_algo_search": "EXHAUSTIVE"}),
        ]
    only = [text for text in os.environ.get("BENCH_ONLY", "").split(",") if text]
    return [row for row in found if not only or any(text in row.label for text in only)]


def main() -> None:
    """Export, rewrite, measure, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        base = open_base(str(write_base(Path(name) / "base", source)))
        fields = run(base, Path(name), device, dtype)
    if source == "random:sd15" and device == "cuda" and not os.environ.get("BENCH_ONLY"):
        keep(f"ort_passes_{dtype}", "python -m benchmarks ort-passes", device, {"base": source} | fields)


def run(base: Base, folder: Path, device: Device, dtype: Dtype) -> dict[str, Any]:
    """All rows of one exported base."""
    export_onnx(base, [], folder / "onnx", ExportOptions(dtype, fixed=default_sizes(base.config) | {"batch_size": 2}))
    artifact = open_artifact(folder / "onnx", verify=False)
    source = OnnxFile(artifact.onnx_path, artifact.manifest.io)
    feeds = random_feeds(source.spec, source.spec.fixed_sizes(), seed=0)
    expected = Reference(base, [], device).adapted(feeds)[0]
    fields: dict[str, Any] = {"dtype": dtype, "opset": artifact.manifest.opset, "rows": []}
    for row in rows(device):
        entry: dict[str, Any] = {**asdict(row), "replaced": dict(ort_graph(source.path, row.passes).replaced)}
        try:
            with OnnxRuntime(row.passes, row.provider).load(source, device) as runner:
                step = runner.step(feeds)
                step.run()
                first = step.outputs["out_sample"].float().cpu()
                error = relative_l2(first, expected)
                step.run()
                entry["repeats"] = torch.equal(step.outputs["out_sample"].float().cpu(), first)
                latency = Latency.of(time_steps({"": step}, device, warm_up=5, iterations=60)[""])
                if device == "cuda" and row.label == f"+ {list(PASSES)[-1]}":
                    fields["kernels"] = kernels(step)
            entry |= {"latency": asdict(latency), "relative_l2": error, "note": step.note}
            text = f"{latency.median_ms:8.3f} ms, p10 {latency.p10_ms:.3f}, p90 {latency.p90_ms:.3f}, "
            text += f"relative L2 {error:.1e}, {'the same' if entry['repeats'] else 'other'} bits again"
        except TrexportError as failure:  # one row that this version of ONNX Runtime does not run says so
            entry["failed"] = text = f"{type(failure).__name__}: {failure}"
        sites = entry["replaced"].get(row.passes[-1], 0) if row.passes else 0
        print(f"{row.label:36} {sites:4} places  {text}", flush=True)
        if "captured" in str(entry.get("note")):
            print(f"{'':36} {entry['note']}")
        fields["rows"].append(entry)
    best = tuple(PASSES) if device == "cuda" else ON_CPU
    fields["left"] = nodes_left(source.path, best)
    print(f"nodes left: {fields['left']}")
    for name, ms in fields.get("kernels", {}).items():
        print(f"{ms:8.3f} ms  {name}")
    if os.environ.get("ORT_PROFILE") == "1":
        fields["profile"] = profile(source, best, feeds, device, folder)
    return fields


def nodes_left(path: Path, passes: Sequence[str]) -> dict[str, int]:
    """The nodes of the rewritten graph by operator, less those on initialisers, which are folded."""
    model = ir.from_proto(onnx.load_from_string(ort_graph(path, passes).model))
    found = Counter(
        node.op_type
        for node in model.graph
        if any(value is not None and not value.is_initializer() for value in node.inputs)
    )
    return dict(found.most_common())


def kernels(step: Step) -> dict[str, float]:
    """Milliseconds of a step by CUDA kernel, the greatest first."""
    runs = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            step.run()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    for event in profiler.key_averages():
        total[f"{event.count // runs:4} × {event.key[:110]}"] += event.device_time_total / runs / 1e3  # type: ignore[assignment]
    return dict(total.most_common(_TOP))


def profile(
    source: OnnxFile, passes: Sequence[str], feeds: Mapping[str, Tensor], device: Device, folder: Path
) -> dict[str, Any]:
    """ONNX Runtime's own account of the last of three runs: how many nodes of each kind ran, and how long each kind took
    from the CPU's side, which for CUDA is launching, unless CUDA_LAUNCH_BLOCKING=1 makes it wait."""
    session = open_session(
        ort_graph(source.path, passes).model,
        device,
        folder=source.path.parent,
        nhwc=False,
        profile=folder / "ort",
        provider={"cudnn_conv_algo_search": "HEURISTIC"},
    )
    spec = source.spec
    inputs = {t.name: feeds[t.name].to(device, DTYPES[t.dtype]).contiguous() for t in spec.inputs}
    outputs = {
        t.name: torch.empty(t.shape(spec.fixed_sizes()), dtype=DTYPES[t.dtype], device=device) for t in spec.outputs
    }
    step = bound_run(session, inputs, outputs, device)
    for _ in range(3):
        step()
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    last = max(index for index, event in enumerate(events) if event["name"].endswith("SequentialExecutor::Execute"))
    begin = events[last]["ts"]
    ran = [
        (event["args"]["op_name"], event["dur"] / 1e3)
        for event in events
        if event["ts"] >= begin and event["name"].endswith("_kernel_time")
    ]
    times: Counter[str] = Counter()
    for name, ms in ran:
        times[name] += ms  # type: ignore[assignment]
    counts = Counter(name for name, _ in ran)
    found = {name: {"nodes": counts[name], "ms": round(ms, 3)} for name, ms in times.most_common(_TOP)}
    for name, entry in found.items():
        print(f"{entry['ms']:8.3f} ms  {entry['nodes']:4} × {name}")
    return found
