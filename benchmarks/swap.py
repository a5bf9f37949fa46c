"""All adapted weights of a UNet written anew, on a GPU: the kernel of `trlora.swap`, plain torch, PEFT, one copy.

For a try on another machine: BENCH_BASES (random:tiny), BENCH_DEVICE (cpu, without graphs). BENCH_PEFT=0 leaves PEFT out.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import keep
from trexport.backends import Device
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base
from trlora import LayerAdapter
from trlora.layers import weight_change
from trlora.residuals import TensorRingResidual
from trlora.swap import WeightWriter
from trlora.transforms import TensorRingTransform

ADAPTER = "random:tlora:2:6"
STRENGTH = 0.7
LOOPS = 40


def main() -> None:
    """Every base and dtype; print, keep."""
    device: Device = "cpu" if os.environ.get("BENCH_DEVICE") == "cpu" else "cuda"
    for source in os.environ.get("BENCH_BASES", "random:sd15,random:sdxl").split(","):
        for dtype in (torch.float16, torch.bfloat16):
            kind = "fp16" if dtype == torch.float16 else "bf16"
            fields = run(source, dtype, device)
            if device == "cuda":
                name = f"swap_{source.removeprefix('random:')}_{kind}"
                keep(name, "python -m benchmarks swap", device, {"base": source, "dtype": kind} | fields)


def run(source: str, dtype: torch.dtype, device: Device) -> dict[str, Any]:
    """The rows of one base."""
    base = open_base(source)
    shapes = base.weight_shapes()
    adapters = {path: layer.float() for path, layer in open_adapters([ADAPTER], base)[0].layers.items()}
    generator = torch.Generator().manual_seed(0)
    pristine = {path: (0.03 * torch.randn(*shapes[path], generator=generator)).to(device, dtype) for path in adapters}
    ring = {path: moved(layer, number) for number, (path, layer) in enumerate(adapters.items())}
    lora = {path: layer.float() for path, layer in open_adapters(["random:lora:16"], base)[0].layers.items()}
    size = sum(weight.nbytes for weight in pristine.values())
    print(f"{source} {dtype}: {len(pristine)} layers, {size / 2**20:.0f} MiB", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    floor = _copy(size, dtype, device)
    rows["copy of as many bytes"] = {"ms": floor}

    buffers = {path: torch.empty_like(weight) for path, weight in pristine.items()}
    writer = WeightWriter(pristine, buffers)
    kinds: dict[str, list[Mapping[str, LayerAdapter]]] = {
        "TLoRA(2,6), any cores": [ring],
        "TLoRA(2,6), as trained from its start": [{path: equal_slices(layer) for path, layer in ring.items()}],
        "LoRA r=16": [lora],
        "TLoRA(2,6) and LoRA r=16 at once": [ring, lora],
    }
    for name, layers in kinds.items():
        start = time.perf_counter()
        active = [(writer.prepare(item), STRENGTH) for item in layers]
        writer.write(active)
        _finish(device)
        first = time.perf_counter() - start
        graph_ms = _timed(lambda active=active: writer.write(active), device)
        walls, wrong = [], None
        for _ in range(10):
            _finish(device)
            start = time.perf_counter()
            writer.write(active)
            wrong = writer.not_finite(active)
            walls.append(1e3 * (time.perf_counter() - start))
        rows[name] = {
            "ms": graph_ms,
            "wall_ms": statistics.median(walls),
            "prepare_and_first_ms": 1e3 * first,
            "wrong": wrong,
            "report": str(writer.write(active)),
        } | errors(pristine, buffers, [(item, STRENGTH) for item in layers])
    prepared = writer.prepare(ring)
    on_device = {path: prepared.on_device(path) for path in ring}
    rows["torch, layer by layer"] = {"ms": _timed(lambda: _plain(pristine, buffers, on_device), device)} | errors(
        pristine, buffers, [(ring, STRENGTH)]
    )
    batched = _Batched(pristine, buffers, on_device, dtype)
    rows["torch, batched by shape"] = {"ms": _timed(batched, device)} | errors(pristine, buffers, [(ring, STRENGTH)])
    if source == "random:sd15" and device == "cuda" and os.environ.get("BENCH_PEFT") != "0":
        rows["PEFT LoRA r=16, merge_adapter"] = {"wall_ms": _peft(base, dtype)}
    for name, row in rows.items():
        parts = [f"{key} {value:.3f}" for key, value in row.items() if key.endswith("ms")]
        parts += [f"{key} {row[key]:.2e}" for key in ("relative_l2", "least_relative_l2") if key in row]
        print(f"  {name:38} {', '.join(parts)}  {row.get('report', '')}", flush=True)
    return {"adapter": ADAPTER, "layers": len(pristine), "weight_bytes": size, "rows": rows}


def moved(layer: LayerAdapter, seed: int) -> LayerAdapter:
    """Cores that are all different, T about as far from the identity as training brings it, Δ of some hundredths of W0."""
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(layer.transform, TensorRingTransform)
    assert isinstance(layer.residual, TensorRingResidual)
    with torch.no_grad():
        for core in layer.transform.core:
            core += 0.03 / core.shape[0] ** 0.5 * torch.randn(core.shape, generator=generator)
    return layer


def equal_slices(layer: LayerAdapter) -> LayerAdapter:
    """The same with the equal slices that a transform keeps which is trained from its start."""
    own = copy.deepcopy(layer)
    with torch.no_grad():
        for core in own.transform.parameters():
            core.copy_(core.mean((2, 3), keepdim=True).expand_as(core))
    return own


def _plain(pristine: Mapping[str, Tensor], buffers: Mapping[str, Tensor], layers: Mapping[str, LayerAdapter]) -> None:
    with torch.no_grad():
        for path, weight in pristine.items():
            change = weight_change(weight, [(layers[path], STRENGTH)])
            assert change is not None
            buffers[path].copy_(change.add_(weight))


class _Batched:
    """What torch does best: weights of one shape stacked, T and L·Rᵀ by batched products, in half precision."""

    def __init__(
        self,
        pristine: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        layers: Mapping[str, LayerAdapter],
        dtype: torch.dtype,
    ) -> None:
        self.groups = []
        for shape in dict.fromkeys(weight.shape for weight in pristine.values()):
            paths = [path for path, weight in pristine.items() if weight.shape == shape]
            cores = [torch.stack([layers[path].transform.core[d].data for path in paths]) for d in range(3)]  # type: ignore[union-attr, index]
            pairs = [layers[path].residual.low_rank() for path in paths]
            left = STRENGTH * torch.stack([pair[0] for pair in pairs]).detach().to(dtype)
            right = torch.stack([pair[1] for pair in pairs]).detach().to(dtype)
            weights = torch.stack([pristine[path] for path in paths])
            self.groups.append((weights, cores, left, right, [buffers[path] for path in paths]))

    def __call__(self) -> None:
        for weights, cores, left, right, outs in self.groups:
            chain = torch.einsum("zijab,zklbc->zkiljac", cores[0], cores[1]).flatten(3, 4).flatten(1, 2)
            matrix = torch.einsum("zijab,zklba->zkilj", chain, cores[2]).flatten(3, 4).flatten(1, 2)
            eye = torch.eye(matrix.shape[-1], device=matrix.device)
            matrix = (eye + STRENGTH * (matrix - eye)).to(weights.dtype)
            merged = torch.baddbmm(torch.bmm(left, right.mT), weights, matrix)
            torch._foreach_copy_(outs, list(merged.unbind()))


def errors(
    pristine: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    active: list[tuple[Mapping[str, LayerAdapter], float]],
) -> dict[str, float]:
    """Against `W0 + Σ s (W0·T + Δ − W0)` of dense float64 members: all layers together, and one rounding of it."""
    found = least = whole = 0.0
    for number, (path, weight) in enumerate(pristine.items()):
        if number % 5 and len(pristine) > 200:
            continue  # SDXL's 560 layers: a fifth of them
        base = weight.double()
        expected = base.clone()
        for layers, strength in active:
            layer = layers[path]
            turned = base @ layer.transform.matrix().detach().to(base)
            expected += strength * (turned + layer.residual.delta().detach().to(base) - base)
        found += (buffers[path].double() - expected).square().sum().item()
        least += (expected.to(weight.dtype).double() - expected).square().sum().item()
        whole += expected.square().sum().item()
    return {"relative_l2": (found / whole) ** 0.5, "least_relative_l2": (least / whole) ** 0.5}


def _copy(size: int, dtype: torch.dtype, device: Device) -> float:
    source = torch.empty(size // 2, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return _timed(lambda: target.copy_(source), device)


def _peft(base: Any, dtype: torch.dtype) -> float:
    """The wall time of one merge, in place, into a UNet on the GPU."""
    import peft
    from diffusers import UNet2DConditionModel

    with torch.device("cuda"):
        unet = UNet2DConditionModel.from_config(base.config)
    assert isinstance(unet, UNet2DConditionModel)
    unet = unet.to(dtype)  # pyright: ignore[reportArgumentType]
    config = peft.LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, unet)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for layer in layers:
            layer.merge()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        for layer in layers:
            layer.unmerge()
    return statistics.median(times)


def _timed(call: Callable[[], object], device: Device) -> float:
    """The median time of a call in milliseconds: on CUDA of replays of its graph, by events."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(LOOPS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def _finish(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
