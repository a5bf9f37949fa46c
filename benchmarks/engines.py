"""AOTInductor's packages of several forms, built side by side, each in a process of its own: one build leaves most cores
idle."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.forms_sd15 import ADAPTER
from trexport.artifact import open_artifact
from trexport.backends import Device, EngineOptions, engine_backend_of
from trexport.engine import build_engine, default_profile
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.adapters import open_adapters
from trexport.models.base import open_base


def build_all(
    base: Path, folder: Path, forms: Mapping[str, ExportOptions], device: Device, level: int
) -> dict[str, dict[str, Any]]:
    """For each form its ONNX model, `folder`/onnx-FORM, and its engine, `folder`/FORM.

    Returns:
        what was measured of each build: seconds (beside the others), seconds of the compiler, bytes of the package.

    Raises:
        SystemExit: a form cannot be exported or built.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(forms), mp_context=context) as pool:
        futures = {
            form: pool.submit(_build, str(base), folder, form, export, device, level) for form, export in forms.items()
        }
        built: dict[str, dict[str, Any]] = {}
        for form, future in futures.items():
            try:
                built[form] = future.result()
            except Exception as error:
                for other in futures.values():
                    other.cancel()
                raise SystemExit(f"{form}: {error}") from error
            print(f"{form}: {built[form]}", flush=True)
    return built


def _build(source: str, folder: Path, form: str, export: ExportOptions, device: Device, level: int) -> dict[str, Any]:
    base = open_base(source)
    adapters = open_adapters([ADAPTER], base)
    start = time.perf_counter()
    export_onnx(base, adapters, folder / f"onnx-{form}", export)
    exported = open_artifact(folder / f"onnx-{form}", verify=False)
    options = EngineOptions((default_profile(exported, base),), device=device, optimization_level=level)
    result = build_engine(exported, base, adapters, folder / form, engine_backend_of("aotinductor"), options)
    assert result is not None
    report = result[1]
    seconds = time.perf_counter() - start
    return {"compile_seconds": report.seconds, "seconds": seconds, "size_bytes": report.size_bytes}
