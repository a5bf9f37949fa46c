"""A step with another adapter put in place before it, every time: what adapters that are inputs of the model would cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.swap import ADAPTER, equal_slices, moved
from trexport.backends import Device
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.session import Session
from trlora import Adapter, LayerParts, save_adapter

_ROUNDS = 60
_WARM_UP = 5


def write_adapter(base: Base, seed: int, trained: bool, folder: Path) -> Path:
    """A random TLoRA(2, 6).

    Args:
        trained: give its transforms the equal slices that those keep which are trained from the paper's start.
    """
    (bound,) = open_adapters([ADAPTER], base)
    layers = {path: moved(layer.float(), seed + number) for number, (path, layer) in enumerate(bound.layers.items())}
    if trained:
        layers = {path: equal_slices(layer) for path, layer in layers.items()}
    adapter = Adapter.of({path: LayerParts.of(layer) for path, layer in layers.items()})
    path = folder / f"adapter-{seed}-{'trained' if trained else 'any'}"
    save_adapter(adapter, path)
    return path


def changing(base: Base, merged: Path, swappable: Path, folder: Path, device: Device) -> dict[str, dict[str, float]]:
    """By wall clock, each to its end: the merged model's step, and activating one of two adapters, by turns, with a step
    behind it. One after the other in every round; medians, milliseconds.

    Args:
        merged, swappable: engines of the two forms.
        folder: for adapters.
    """
    kinds = {
        kind: [write_adapter(base, seed, trained, folder) for seed in (1000, 2000)]
        for kind, trained in (("any cores", False), ("as trained from their start", True))
    }
    found: dict[str, dict[str, float]] = {}
    with Session(merged, device, verify=False) as plain, Session(swappable, device, verify=False) as session:
        feeds = random_feeds(session.spec, {}, seed=0)
        steps = [plain.step(feeds).run, session.step(feeds).run]
        for kind, paths in kinds.items():
            names = [f"{kind} {number}" for number in range(len(paths))]
            for name, path in zip(names, paths, strict=True):
                session.load_adapter(name, path)
                session.activate({name: 1.0})
            times: dict[str, list[float]] = {"merged step": [], "swap": [], "swap and step": []}
            for number in range(_ROUNDS + _WARM_UP):
                merged_ms = _timed(steps[0], device)
                start = time.perf_counter()
                session.activate({names[number % len(names)]: 1.0})
                swapped = time.perf_counter()
                steps[1]()
                _finish(device)
                done = time.perf_counter()
                if number >= _WARM_UP:
                    times["merged step"].append(merged_ms)
                    times["swap"].append(1e3 * (swapped - start))
                    times["swap and step"].append(1e3 * (done - start))
            row: dict[str, Any] = {f"{name}, ms": statistics.median(values) for name, values in times.items()}
            found[kind] = row | {"ratio": row["swap and step, ms"] / row["merged step, ms"]}
    return found


def _timed(run: Callable[[], object], device: Device) -> float:
    start = time.perf_counter()
    run()
    _finish(device)
    return 1e3 * (time.perf_counter() - start)


def _finish(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
