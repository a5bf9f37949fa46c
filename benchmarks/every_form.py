"""What `trexport bench --forms` prints, at the size of Stable Diffusion 1.5 on a GPU, fp16.

For a try on another machine: BENCH_BASE (random:tiny), BENCH_DEVICE (cpu), BENCH_DTYPE (fp32), BENCH_TMP.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import cast

from benchmarks.forms_sd15 import ADAPTER
from benchmarks.merge_sd15 import write_base
from benchmarks.record import keep
from trexport.backends import Device
from trexport.bench.every_form import bench_every_form
from trexport.bench.run import BenchOptions
from trexport.cli.show import show_every_form
from trexport.io_spec import Dtype
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base


def main() -> None:
    """Make, measure, print, keep."""
    source = os.environ.get("BENCH_BASE", "random:sd15")
    device = cast(Device, os.environ.get("BENCH_DEVICE", "cuda"))
    dtype = cast(Dtype, os.environ.get("BENCH_DTYPE", "fp16"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        base = open_base(str(write_base(folder / "base", source)))
        options = BenchOptions(dtype=dtype, warm_up=5, iterations=60 if device == "cuda" else 5)
        found = bench_every_form(base, open_adapters([ADAPTER], base), device, folder, options)
    show_every_form(found)
    if source == "random:sd15" and device == "cuda":
        about = {"base": source, "adapter": ADAPTER}
        keep(f"every_form_{dtype}", "python -m benchmarks every-form", device, about | found.to_dict())
