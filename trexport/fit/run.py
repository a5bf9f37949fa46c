"""`trexport fit`: a small adapter from two checkpoints, layer by layer."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from trexport import __version__
from trexport.cores import single_threaded_torch
from trexport.errors import TrexportError
from trexport.fit.goal import FitGoal, FitReport, FittedLayer, check_budget
from trexport.fit.plan import FitPlan, TargetLayer
from trexport.fit.store import Store, StoredFit
from trexport.progress import SILENT, Progress
from trlora import Adapter, BaseModel, save_adapter
from trlora.errors import TrloraError
from trlora.files import check_free
from trlora.fit import FitOptions, Point, Search, fit_curve, within_budget, within_error

_SHARES = 8
"""No layer is tried with more than so many times its equal share of a budget: hardly any would get it, and it takes long."""


def fit(
    plan: FitPlan,
    goal: FitGoal,
    out: Path,
    options: FitOptions | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = SILENT,
) -> FitReport:
    """Fit an adapter to every layer of the plan and write it as a checkpoint; the same arguments give the same bytes.

    Layers are fitted side by side and kept on the disk as they are finished. What was stopped goes on from there when it is
    called again with the same arguments.

    Args:
        out: a folder, or a file that ends in `.safetensors`.
        restart: throw away what another fit has left.

    Raises:
        FileExistsError: there is something at `out` and `overwrite` is not set.
        TrexportError: the budget is too small, the error cannot be reached, or another fit has left finished layers.
        TrloraError: the adapter cannot be built for a layer.
    """
    options = options or FitOptions()
    check_out(out, overwrite=overwrite)
    smallest = check_budget(plan, goal)
    with Store(out, _fingerprint(plan, goal, options), restart=restart) as store:
        _fit_layers(plan, goal, options, smallest, store, progress)
        curves = [store.read(layer.path) for layer in plan.layers]
        chosen = _choose(plan, goal, curves, store)
        parts = {layer.path: fit.parts for layer, fit in zip(plan.layers, chosen, strict=True) if fit is not None}
        adapter = Adapter.of(parts, base_model=BaseModel(plan.base.name, plan.base.architecture.class_name))
        save_adapter(adapter, out, overwrite=overwrite)
        store.remove()
    return _report(plan, curves, chosen)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise `FileExistsError` where the adapter could not be written."""
    if out.suffix != ".safetensors":
        check_free(out, overwrite=overwrite)
    elif out.exists() and not (overwrite and out.is_file()):
        raise FileExistsError(f"{out} exists; choose another name, or pass --overwrite")


def _search(plan: FitPlan, goal: FitGoal, smallest: int) -> Search:
    dense = max(math.prod(layer.shape) for layer in plan.layers)
    most, enough = max(dense, smallest), 0.0
    if goal.budget is not None:
        most = min(goal.budget, max(smallest, _SHARES * goal.budget // len(plan.layers)))
    if goal.max_error is not None:
        enough = goal.max_error / 2  # better than asked for, so that it may make up for others
    return Search(goal.free_transform, goal.free_residual, most, enough)


def _fit_layers(
    plan: FitPlan, goal: FitGoal, options: FitOptions, smallest: Mapping[str, int], store: Store, progress: Progress
) -> None:
    """Every layer that the store does not have yet."""
    stop = threading.Event()

    def work(layer: TargetLayer) -> None:
        if stop.is_set():
            return
        base, tuned = layer.pair.weights()
        seed = int.from_bytes(hashlib.sha256(layer.path.encode()).digest()[:4], "little")
        own = dataclasses.replace(options, seed=options.seed + seed)  # a layer's alone, whatever else is fitted
        try:
            found = fit_curve(
                base, tuned, goal.spec, _search(plan, goal, smallest[layer.path]), own, stopped=stop.is_set
            )
        except TrloraError as error:
            raise type(error)(f"{layer.path}: {error}") from error
        store.write(layer.path, found)

    total = sum(math.prod(layer.shape) for layer in plan.layers)
    # the greatest first, so that no core is left alone with one at the end
    order = sorted(plan.layers, key=lambda layer: (-math.prod(layer.shape), layer.path))
    with (
        progress.task("fit", total) as task,
        single_threaded_torch() as threads,
        ThreadPoolExecutor(max(1, threads)) as pool,
    ):
        pending: dict[Future[None], TargetLayer] = {}
        for layer in order:
            if store.has(layer.path):
                task.advance(math.prod(layer.shape))
            else:
                pending[pool.submit(work, layer)] = layer
        try:
            for future in as_completed(pending):
                future.result()
                task.advance(math.prod(pending[future].shape))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _choose(
    plan: FitPlan, goal: FitGoal, curves: Sequence[Sequence[StoredFit]], store: Store
) -> list[StoredFit | None]:
    """One fit of each layer, or None for a layer that goes without."""
    if not goal.searches:
        return [curve[-1] for curve in curves]
    points = [
        [Point(0, curve[0].change ** 2), *(Point(fit.parameters, fit.error**2) for fit in curve)] for curve in curves
    ]
    if goal.budget is not None:
        numbers = within_budget(points, goal.budget)
    else:
        assert goal.max_error is not None
        change = math.fsum(curve[0].squared_error for curve in points)
        found = within_error(points, goal.max_error**2 * change)
        if found is None:
            store.remove()
            best = [min(curve, key=lambda point: point.squared_error) for curve in points]
            reached = math.sqrt(math.fsum(point.squared_error for point in best) / change)
            raise TrexportError(
                f"an error of {goal.max_error:g} is not reached: the best is {reached:.4g}, with "
                f"{sum(point.parameters for point in best)} parameters; allow more, or choose other members or sizes"
            )
        numbers = found
    return [curve[number - 1] if number else None for curve, number in zip(curves, numbers, strict=True)]


def _report(plan: FitPlan, curves: Sequence[Sequence[StoredFit]], chosen: Sequence[StoredFit | None]) -> FitReport:
    layers = []
    for layer, curve, fit in zip(plan.layers, curves, chosen, strict=True):
        change = curve[0].change
        if fit is None:
            layers.append(FittedLayer(layer.path, None, 0, change, change, ""))
        else:
            layers.append(FittedLayer(layer.path, fit.parts.spec, fit.parameters, fit.error, change, fit.method))
    return FitReport(tuple(layers))


def _fingerprint(plan: FitPlan, goal: FitGoal, options: FitOptions) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        "base": plan.base.name,
        "layers": {layer.path: [list(layer.shape), *layer.hashes] for layer in plan.layers},
        "goal": {**{name: value for name, value in vars(goal).items() if name != "spec"}, "spec": goal.spec.to_dict()},
        "options": vars(options),
        "versions": {"trexport": __version__, "torch": torch.__version__},
    }
