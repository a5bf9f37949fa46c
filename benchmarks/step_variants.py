"""One UNet step under `torch.compile`: plain, as PyTorch's users make it fast, and with our rewrites one after another.

BENCH_VARIANTS chooses, by commas, among the names of `VARIANTS` and `norm-kernels`, which times the group normalisations of
the UNet alone; each variant is compiled for about a minute. For a try on another machine: BENCH_BASE (random:tiny),
BENCH_DEVICE (cpu), BENCH_DTYPE (fp32).

BENCH_CUDNN says whether cuDNN takes what its heuristics say (`heuristics`, unless given) or times its algorithms in the
first run (`benchmark`). It is one for the whole run: torch keeps the plan of the first convolution of a shape, however it
was found.
"""

from __future__ import annotations

import copy
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.norm_kernels import NamedStep, time_norms
from benchmarks.record import keep
from trexport.backends import Device, Step
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.io_spec import Dtype
from trexport.models.architectures import default_sizes, spec_of
from trexport.models.base import open_base
from trexport.models.fused import ALL, PROJECTIONS, FuseOptions, fuse_
from trexport.models.fused.join import join_norms_
from trexport.models.fused.join_linear import join_linears_
from trexport.models.model import DTYPES, first_output, load_model, random_feeds
from trexport.parity.metrics import relative_l2

ITERATIONS = 60
PROFILED = 5


@final
@dataclass(frozen=True)
class Variant:
    """How to make the model fast."""

    rewrites: tuple[str, ...] = ()
    triton: bool = False
    joined: bool = False
    """Exported first, then `join_norms_`."""
    linears: bool = False
    """Exported first, then `join_linears_`."""
    cudnn_attention: bool = False
    diffusers_qkv: bool = False
    """What diffusers has: `fuse_qkv_projections`."""
    inductor: Mapping[str, Any] = field(default_factory=dict)


_PRODUCTS = (*PROJECTIONS, "projection")
_MM = {"conv_1x1_as_mm": True}
_TUNED = {"coordinate_descent_tuning": True}
_BEST = Variant(diffusers_qkv=True, cudnn_attention=True, inductor=_MM)
_PROJECTIONS = Variant(_PRODUCTS, cudnn_attention=True, inductor=_MM)
_NORMS = replace(_PROJECTIONS, rewrites=tuple(name for name in ALL if name != "upsampling"), triton=True)
_JOINED = replace(_NORMS, joined=True)
_LINEARS = replace(_JOINED, linears=True)
_UPSAMPLING = replace(_LINEARS, rewrites=ALL)
VARIANTS = {
    "plain": Variant(),
    "best-pytorch": _BEST,
    "best-pytorch-tuned": replace(_BEST, inductor=_MM | _TUNED),
    "projections": _PROJECTIONS,
    "projections-tuned": replace(_PROJECTIONS, inductor=_MM | _TUNED),
    "norms": _NORMS,
    "joined": _JOINED,
    "linears": _LINEARS,
    "upsampling": _UPSAMPLING,
    "joined-default-attention": replace(_JOINED, cudnn_attention=False),
    "joined-tuned": replace(_JOINED, inductor=_MM | _TUNED),
    "upsampling-pdl": replace(_UPSAMPLING, inductor=_MM | {"triton.enable_pdl": True}),
    "linears-autotuned": replace(_LINEARS, inductor=_MM | {"max_autotune": True}),
}
DEFAULT = "best-pytorch,projections,joined,linears,upsampling"

# the first that matches a kernel's name
CLASSES = {
    "copy": r"Memset|Memcpy",
    "attention": r"sdpa|flash|fmha|attention",
    "layer norm": r"layer_norm",
    "group norm": r"norm|slab_kernel|statistics_kernel|normalise_kernel",
    "conv": r"fprop|implicit_gemm|cask_plugin|nhwcAddPadding|conv2d|cudnn",
    "gemm": r"linear_kernel|nvjet|gemm|cutlass|cublas|splitK|triton_tem|_mm",
    "geglu": r"gelu",
    "pointwise": r"",
}


def main() -> None:
    """Compile, compare, measure, profile, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    names = os.environ.get("BENCH_VARIANTS", DEFAULT).split(",")
    unknown = [name for name in names if name not in (*VARIANTS, "norm-kernels")]
    if unknown:
        raise SystemExit(f"BENCH_VARIANTS: {unknown[0]} is unknown, expected some of {[*VARIANTS, 'norm-kernels']}")
    cudnn = os.environ.get("BENCH_CUDNN", "heuristics")
    if cudnn not in ("benchmark", "heuristics"):
        raise SystemExit(f"BENCH_CUDNN: {cudnn} is unknown, expected benchmark or heuristics")
    torch.backends.cudnn.benchmark = cudnn == "benchmark"
    fields: dict[str, Any] = {"cudnn": cudnn}
    if "norm-kernels" in names:
        names.remove("norm-kernels")
        fields["norm_kernels"] = time_norms(open_base(source), device, dtype)
    if names:
        fields |= run(source, device, dtype, names)
    if source == "random:sd15" and device == "cuda":
        variables = {"BENCH_VARIANTS": os.environ.get("BENCH_VARIANTS", DEFAULT), "BENCH_CUDNN": cudnn}
        about = {"variables": variables | {"BENCH_DTYPE": dtype}, "base": source}
        keep(f"step_variants_{dtype}_{cudnn}", "python -m benchmarks step-variants", device, about | fields)


def run(source: str, device: Device, dtype: Dtype, names: list[str]) -> dict[str, Any]:
    """All variants in one run, their steps interleaved."""
    base = open_base(source)
    sizes = default_sizes(base.config)
    given = random_feeds(spec_of(base.config, dtype), sizes)
    model = load_model(base)
    reference = reference_of(model, given, device)
    feeds = {name: tensor.to(device) for name, tensor in given.items()}
    model.to(DTYPES[dtype])
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    models: list[nn.Module] = []  # a graph does not keep the weights that it reads
    for name in names:
        start = time.perf_counter()
        models.append(copy.deepcopy(model))
        steps[name], report = prepared(models[-1], VARIANTS[name], feeds, device)
        seconds = time.perf_counter() - start
        steps[name].run()
        error = relative_l2(steps[name].outputs["out_sample"].float().cpu(), reference)
        results[name] = asdict(VARIANTS[name]) | {"fused": report, "compile_seconds": seconds, "relative_l2": error}
        print(f"{name}: compiled in {seconds:.0f} s, relative L2 to fp32 {error:.2e}", flush=True)
    latencies = time_steps(steps, device, warm_up=5, iterations=ITERATIONS if device == "cuda" else 3)
    for name, values in latencies.items():
        latency = Latency.of(values)
        results[name]["latency"] = asdict(latency)
        results[name] |= profiled(steps[name]) if device == "cuda" else {}
        print(
            f"{name:24} {latency.median_ms:7.3f} ms (p10 {latency.p10_ms:.3f}, p90 {latency.p90_ms:.3f})  "
            f"{results[name].get('kernels', '')} {results[name].get('classes', '')}",
            flush=True,
        )
    return {"sizes": sizes, "dtype": dtype, "variants": results}


def reference_of(model: nn.Module, feeds: Mapping[str, Tensor], device: Device) -> Tensor:
    """The step in float32, eager, on the inputs as the variants see them."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        model.to(device)
        with torch.inference_mode():
            return first_output(model, {name: t.float().to(device) for name, t in feeds.items()}).cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def attention_of(variant: Variant) -> Iterator[None]:
    """cuDNN's attention where a variant wants it and has not named the kernel itself, as our rewrites do."""
    ask = variant.cudnn_attention and not variant.rewrites and torch.cuda.is_available()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if ask else nullcontext():
        yield


def prepared(
    model: nn.Module, variant: Variant, feeds: Mapping[str, Tensor], device: Device
) -> tuple[Step, dict[str, Any]]:
    """A compiled step, on CUDA as a graph, and what was rewritten."""
    cuda = device == "cuda"
    report: dict[str, Any] = {}
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if variant.diffusers_qkv:
        model.fuse_qkv_projections()  # type: ignore[operator]
    if variant.rewrites:
        options = FuseOptions(
            variant.rewrites,
            "triton" if variant.triton and cuda else "torch",
            "cudnn" if variant.cudnn_attention and cuda else "default",
        )
        report = fuse_(cast(Any, model), options).to_dict()
    step: nn.Module = NamedStep(model)
    if variant.joined or variant.linears:
        with torch.no_grad():
            program = torch.export.export(step, (), dict(feeds))
        report |= {"norms": join_norms_(program)} if variant.joined else {}
        report |= {"linears": join_linears_(program)} if variant.linears else {}
        step = program.module()
    print(report, flush=True)
    torch.compiler.reset()
    step.compile(fullgraph=True, dynamic=False, options=dict(variant.inductor))
    with attention_of(variant), torch.inference_mode():
        out = step(**feeds)
        for _ in range(2):
            step(**feeds)
        if not cuda:

            def again() -> None:
                with torch.inference_mode():
                    out.copy_(step(**feeds))

            return Step(again, feeds, {"out_sample": out}), report
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(**feeds)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(**feeds)
    return Step(graph.replay, feeds, {"out_sample": out}), report


def profiled(step: Step) -> dict[str, Any]:
    """Kernels of one step: their number, and their time by class and by name."""
    step.run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step.run()
        torch.cuda.synchronize()
    time_ms: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.key_averages():
        if event.self_device_time_total:
            time_ms[event.key] += event.self_device_time_total / 1e3 / PROFILED
            calls[event.key] += event.count / PROFILED
    classes: dict[str, dict[str, float]] = {name: {"ms": 0.0, "calls": 0.0} for name in CLASSES}
    for kernel, spent in time_ms.items():
        of = next(name for name, pattern in CLASSES.items() if re.search(pattern, kernel))
        classes[of]["ms"] += spent
        classes[of]["calls"] += calls[kernel]
    rounded = {name: {key: round(value, 3) for key, value in entry.items()} for name, entry in classes.items()}
    top = [[kernel[:160], round(spent, 4), calls[kernel]] for kernel, spent in time_ms.most_common(60)]
    return {"kernels": sum(calls.values()), "kernel_ms": sum(time_ms.values()), "classes": rounded, "top": top}
