"""How near adapters of equal size come to a full fine-tune, method by method: results.json and errors.png.

python examples/fit/tune.py tuned                # the full fine-tune, a few minutes
python examples/fit/simulate.py tuned            # every method at every budget
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trexport.cores import single_threaded_torch
from trexport.fit.plan import FitPlan, open_tuned, plan_fit
from trexport.models.base import open_base
from trlora import AdapterSpec
from trlora.fit import FitOptions, LayerFit, Point, Search, fit_curve, within_budget

HERE = Path(__file__).parent
BASE = "sample:digits"
BUDGETS = (2_000, 4_000, 8_000, 16_000, 24_000, 32_000)
LARGEST_SHARE = 0.75
"""Of a layer's own weights that its adapter may have: beyond that nothing is saved."""

TRM, TR, LORA, OFT = "tensor_ring", "tensor_ring", "low_rank", "block_orthogonal"
METHODS: dict[str, tuple[str, str]] = {
    "LoRA": ("identity", LORA),
    "TR": ("identity", TR),
    "OFT + LoRA": (OFT, LORA),
    "TRM + LoRA": (TRM, LORA),
    "TRM + TR": (TRM, TR),
}
"""Transform and residual. All ranks and block sizes are chosen, layer by layer."""

Curves = list[list[LayerFit]]


def fit_method(plan: FitPlan, transform: str, residual: str, options: FitOptions) -> Curves:
    """For every layer its fits in ever more parameters."""
    spec = AdapterSpec.from_dict({"transform": {"type": transform}, "residual": {"type": residual}})

    def curve(number: int) -> list[LayerFit]:
        base, tuned = plan.layers[number].pair.weights()
        search = Search(transform != "identity", True, int(LARGEST_SHARE * base.numel()))
        return fit_curve(base, tuned, spec, search, options)

    with single_threaded_torch() as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(curve, range(len(plan.layers))))


def at_budget(curves: Curves, budget: int) -> dict[str, float | int]:
    """What the best division of a budget over the layers leaves; a layer may go without."""
    points = [
        [Point(0, curve[0].change ** 2), *(Point(fit.parameters, fit.error**2) for fit in curve)] for curve in curves
    ]
    chosen = [curve[number] for curve, number in zip(points, within_budget(points, budget), strict=True)]
    error = math.sqrt(sum(point.squared_error for point in chosen) / sum(curve[0].squared_error for curve in points))
    return {
        "budget": budget,
        "parameters": sum(point.parameters for point in chosen),
        "layers_with_an_adapter": sum(point.parameters > 0 for point in chosen),
        "error": error,
    }


def spectrum(plan: FitPlan) -> dict[str, float]:
    """How flat the changes' singular values are: the mean share of `‖W* − W0‖²` in the greatest few."""

    def shares(weights: tuple[Tensor, Tensor]) -> Tensor:
        values = torch.linalg.svdvals(weights[1].double().flatten(1) - weights[0].double().flatten(1)).square()
        return (values.cumsum(0) / values.sum())[[0, 1, 3, 7]]

    mean = torch.stack([shares(layer.pair.weights()) for layer in plan.layers]).mean(0)
    return dict(zip(["1", "2", "4", "8"], mean.tolist(), strict=True))


def simulate(
    plan: FitPlan,
    budgets: Sequence[int] = BUDGETS,
    options: FitOptions | None = None,
    names: Sequence[str] = tuple(METHODS),
) -> dict[str, dict[str, Any]]:
    """The methods at every budget."""
    found = {}
    for name in names:
        transform, residual = METHODS[name]
        started = time.perf_counter()
        curves = fit_method(plan, transform, residual, options or FitOptions())
        found[name] = {
            "transform": transform,
            "residual": residual,
            "points": [at_budget(curves, budget) for budget in budgets],
            "fits": sum(len(curve) for curve in curves),
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(name, [round(float(point["error"]), 4) for point in found[name]["points"]], flush=True)
    return found


def record(plan: FitPlan, methods: Mapping[str, Any], options: FitOptions) -> dict[str, Any]:
    """What goes into results.json."""
    dense = sum(math.prod(layer.shape) for layer in plan.layers)
    norm = math.sqrt(sum(float(layer.pair.weights()[0].double().square().sum()) for layer in plan.layers))
    return {
        "error": "‖W* − W'‖_F / ‖W* − W0‖_F over all targets",
        "base": plan.base.name,
        "tuned": plan.tuned.content_hash(),
        "targets": "attention",
        "layers": len(plan.layers),
        "weights": dense,
        "change_over_base": plan.target_change / norm,
        "share_of_squared_change": plan.target_share,
        "squared_change_in_greatest_singular_values": spectrum(plan),
        "methods": methods,
        "options": vars(options),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Error against parameters, a line for each method."""
    figure = Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    for (name, method), marker in zip(results["methods"].items(), "os^Dv", strict=True):
        points = method["points"]
        axis.plot([p["parameters"] for p in points], [p["error"] for p in points], marker=marker, label=name, ms=5)
    axis.set_xscale("log")
    axis.set_xlabel(f"parameters, over {results['layers']} layers of {results['weights']:,} weights")
    axis.set_ylabel("‖W* − W′‖ ÷ ‖W* − W0‖")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", help="folder of the fine-tuned UNet, from tune.py")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the results (default: beside this script)")
    parser.add_argument(
        "--only", action="append", choices=METHODS, metavar="METHOD", help="run this, keep the others of results.json"
    )
    arguments = parser.parse_args()
    base = open_base(BASE)
    plan = plan_fit(base, open_tuned(arguments.tuned, base), ["attention"])
    options, file = FitOptions(), arguments.out / "results.json"
    found = simulate(plan, options=options, names=arguments.only or tuple(METHODS))
    before = json.loads(file.read_text("utf-8")) if arguments.only else {"methods": {}}
    methods = before["methods"] | found
    results = record(plan, {name: methods[name] for name in METHODS}, options)
    if arguments.only and before["tuned"] != results["tuned"]:
        parser.error(f"{file} is of another fine-tune; run all methods")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    draw(results, arguments.out / "errors.png")


if __name__ == "__main__":
    main()
