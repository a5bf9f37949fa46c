"""What is trained: every run of the study, in order of importance, and the file that holds what came of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from methods import ALL_METHODS, BUDGETS, CLAIMS, METHODS, NOTHING

Task = Literal["subject", "control"]
TASKS: tuple[Task, ...] = ("subject", "control")
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MIDDLE = BUDGETS[1]


@dataclass(frozen=True)
class Run:
    """One training."""

    task: Task
    method: str
    budget: int
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Its file's name; only runs that look for a learning rate have it in there."""
        rate = f"-rate{self.rate:g}" if self.seed == TUNING_SEED else ""
        return f"{self.task}-{self.method}-{self.budget}-seed{self.seed}{rate}"


def tuning_runs(task: Task, methods: Collection[str] = ALL_METHODS) -> list[Run]:
    """Each method whose rate is looked for, with each learning rate, at the middle budget and with a seed of its own."""
    families = dict.fromkeys(ALL_METHODS[method].family for method in methods)
    return [Run(task, family, MIDDLE, TUNING_SEED, rate) for family in families for rate in RATES]


def study_runs(task: Task, rates: Mapping[str, float], methods: Collection[str] = ALL_METHODS) -> list[Run]:
    """The runs that count: all methods at the middle budget, the claims' there, then the other budgets.

    Raises:
        KeyError: a method has no rate, since its runs that look for one are missing or all broke off.
    """
    kinds = [(method, MIDDLE) for method in (*METHODS, *CLAIMS)] + [(method, 0) for method in NOTHING]
    kinds += [(method, budget) for budget in BUDGETS if budget != MIDDLE for method in METHODS]
    kinds = [(method, budget) for method, budget in kinds if method in methods]
    return [
        Run(task, method, budget, seed, rates[ALL_METHODS[method].family]) for method, budget in kinds for seed in SEEDS
    ]


def best_rates(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """For each method the rate of its run with the least loss on the validation pictures; a run that broke off has none."""
    best: dict[str, tuple[float, float]] = {}
    for result in results:
        run, loss = result["run"], result["validation_loss"]
        if run["seed"] == TUNING_SEED and loss is not None:
            best[run["method"]] = min(best.get(run["method"], (float("inf"), 0.0)), (loss, run["rate"]))
    return {method: rate for method, (_, rate) in best.items()}


def result_file(folder: Path, run: Run) -> Path:
    """Where the result of a run lies."""
    return folder / f"{run.name}.json"


def write_result(folder: Path, run: Run, result: dict[str, Any]) -> None:
    """Write a run's result, whole or not at all."""
    path = result_file(folder, run)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"run": asdict(run), **result}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_results(folder: Path, task: Task | None = None) -> list[dict[str, Any]]:
    """All results of a folder, of one task or of both, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{task or '*'}-*.json"))]
