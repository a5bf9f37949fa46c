"""A batch with an adapter of its own for every sample, in AOTInductor at the size of Stable Diffusion 1.5: a step against
the merged model's with as many samples, and what it takes to put an adapter into a place.

BENCH_PLACES (8), BENCH_LEVEL (1), BENCH_DTYPE (fp16); for a try on another machine BENCH_BASE (random:tiny), BENCH_DEVICE
(cpu), BENCH_TMP.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.engines import build_all
from benchmarks.forms_sd15 import ADAPTER
from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.artifact import open_artifact
from trexport.backends import Device, EngineFile
from trexport.bench.forms import cost_of, file_for
from trexport.bench.run import BenchOptions, bench
from trexport.graph.export import ExportOptions
from trexport.graph.factored import FactoredOptions
from trexport.io_spec import Dtype
from trexport.models.adapters import open_adapters
from trexport.models.architectures import default_sizes
from trexport.models.base import Base, open_base


def main() -> None:
    """Build both, measure side by side, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    places, level = int(os.environ.get("BENCH_PLACES", "8")), int(os.environ.get("BENCH_LEVEL", "1"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        base = open_base(str(write_base(Path(name) / "base", source)))
        fields = run(base, Path(name), device, dtype, places, level)
    if source == "random:sd15" and device == "cuda":
        about = {"base": source, "adapter": ADAPTER, "places": places, "optimization_level": level}
        keep(f"engine_bank_{dtype}", "python -m benchmarks engine-bank", device, about | fields)


def run(base: Base, folder: Path, device: Device, dtype: Dtype, places: int, level: int) -> dict[str, Any]:
    """Samples as many as places, each with a place of its own; the same adapter lies in all, which changes no time."""
    (adapter,) = open_adapters([ADAPTER], base)
    fixed = default_sizes(base.config) | {"batch_size": places}
    forms: dict[str, dict[str, Any]] = {"merged": {}, "bank": {"factored": FactoredOptions(blank=True, bank=places)}}
    assert base.folder is not None
    exports = {form: ExportOptions(dtype, fixed=fixed, **fields) for form, fields in forms.items()}
    build = build_all(base.folder, folder, exports, device, level)
    engines = {form: open_artifact(folder / form, verify=False) for form in forms}
    many = [replace(adapter, name=f"{adapter.name} {place}") for place in range(1, places + 1)]
    bank = file_for(engines["bank"], many, device, range(places))
    merged = file_for(engines["merged"], [adapter], device)
    assert isinstance(bank, EngineFile)
    assert isinstance(merged, EngineFile)
    files = {"merged": merged, f"bank of {places}": bank}
    options = BenchOptions(("aotinductor",), dtype=dtype, warm_up=5, iterations=40, sizes=fixed)
    report = bench(base, [adapter], {}, device, options, engines=files)
    del files, bank, merged
    for result in report.results:
        print(
            f"{result.backend:12} {result.latency.median_ms:8.3f} ms, relative L2 {result.relative_l2:.1e}", flush=True
        )
    one, other = report.results
    print(f"bank ÷ merged {other.latency.median_ms / one.latency.median_ms:.3f}")
    cost = cost_of(engines["bank"], [adapter], device, other)
    print(f"an adapter into a place: {cost.swap_ms:.3f} ms, {cost.swapped_by}")
    return {"build": build, "bench": report.to_dict(), "cost": asdict(cost)}
