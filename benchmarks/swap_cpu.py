"""All 128 adapted weights of Stable Diffusion 1.5 written anew on a CPU, float32: `trlora.swap` against dense products and a
copy, by turns in one process.

For a try: BENCH_BASE (random:tiny), BENCH_ROUNDS.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.record import keep
from benchmarks.swap import ADAPTER, STRENGTH, equal_slices, errors, moved
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base
from trlora import LayerAdapter
from trlora.swap import WeightWriter


def main() -> None:
    """Measure, print, keep."""
    source, rounds = os.environ.get("BENCH_BASE", "random:sd15"), int(os.environ.get("BENCH_ROUNDS", "7"))
    base = open_base(source)
    shapes = base.weight_shapes()
    generator = torch.Generator().manual_seed(0)
    layers = {path: layer.float() for path, layer in open_adapters([ADAPTER], base)[0].layers.items()}
    pristine = {path: 0.03 * torch.randn(*shapes[path], generator=generator) for path in layers}
    buffers = {path: torch.empty_like(weight) for path, weight in pristine.items()}
    writer = WeightWriter(pristine, buffers)
    any_cores = {path: moved(layer, number) for number, (path, layer) in enumerate(layers.items())}
    trained = {path: equal_slices(layer) for path, layer in any_cores.items()}
    ways: dict[str, tuple[Callable[[], object], Mapping[str, LayerAdapter] | None]] = {
        "copy of as many bytes": (lambda: torch._foreach_copy_([*buffers.values()], [*pristine.values()]), None),
        "T formed, W0·T + Δ by dense products": (lambda: _dense(pristine, buffers, any_cores), any_cores),
    }
    for name, item in (("any cores", any_cores), ("as trained from its start", trained)):
        prepared = writer.prepare(item)
        ways[f"trlora.swap, {name}"] = (lambda prepared=prepared: writer.write([(prepared, STRENGTH)]), item)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (write, _) in ways.items():
            start = time.perf_counter()
            write()
            seconds[name].append(time.perf_counter() - start)
    rows: dict[str, dict[str, float]] = {}
    for name, (write, item) in ways.items():
        rows[name] = {"ms": 1e3 * statistics.median(seconds[name][1:])}  # the first time memory is taken
        if item is not None:
            write()
            rows[name] |= errors(pristine, buffers, [(item, STRENGTH)])
        print(f"  {name:40} " + ", ".join(f"{key} {value:.3g}" for key, value in rows[name].items()), flush=True)
    if source == "random:sd15":
        size = sum(weight.nbytes for weight in pristine.values())
        about = {"base": source, "adapter": ADAPTER, "layers": len(pristine), "weight_bytes": size, "rounds": rounds}
        keep("swap_cpu", "python -m benchmarks swap-cpu", "cpu", about | {"rows": rows})


@torch.no_grad()
def _dense(pristine: Mapping[str, Tensor], buffers: Mapping[str, Tensor], layers: Mapping[str, LayerAdapter]) -> None:
    for path, weight in pristine.items():
        layer = layers[path]
        whole = weight @ layer.transform.matrix() + layer.residual.delta()
        torch.lerp(weight, whole, STRENGTH, out=buffers[path])
