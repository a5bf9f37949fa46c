"""Run the study: look for learning rates, train every method at every budget with every seed, draw, and write what came out.

Each run leaves NAME.json (its losses) and NAME.npz (its pictures) in the output folder and is skipped when they are there.
`report.py` judges the pictures and makes the tables.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder import ENCODER_PARAMETERS
from methods import ALL_METHODS
from runs import TASKS, TUNING_SEED, Run, best_rates, read_results, result_file, study_runs, tuning_runs, write_result
from stack import Stack
from tasks import Study
from torch import Tensor
from training import Losses, OutOfTime, draw, measure, new_stack, train, trained_weights

STEPS = 400
CURVE_STEP = 20
"""Losses are written as means of so many steps."""


def packs(runs: Sequence[Run], folder: Path, size: int) -> Iterator[list[Run]]:
    """The runs without a result, so many at once, those of one method and budget together in each."""
    waiting = [run for run in runs if not result_file(folder, run).exists()]
    for start in range(0, len(waiting), size):
        pack = waiting[start : start + size]
        kinds = list(dict.fromkeys((run.method, run.budget) for run in pack))
        yield sorted(pack, key=lambda run: kinds.index((run.method, run.budget)))


def do_pack(study: Study, pack: list[Run], folder: Path, steps: int, deadline: Callable[[float], bool]) -> None:
    """Train a pack of runs, measure and draw, and write all results.

    Raises:
        OutOfTime: it would not end in time; nothing is written then.
    """
    started = time.perf_counter()
    stack = new_stack(study, pack)
    before = measure(study, stack, trained_weights(stack), choosing=False)
    losses = train(study, stack, steps, deadline=deadline)
    weights = trained_weights(stack)
    after = {choosing: measure(study, stack, weights, choosing) for choosing in (True, False)}
    pictures = draw(study, stack, weights) if any(run.seed != TUNING_SEED for run in pack) else None
    seconds = time.perf_counter() - started
    for index, run in enumerate(pack):
        if pictures is not None:
            np.savez_compressed(folder / f"{run.name}.npz", pictures=pictures[index].numpy())
        write_result(folder, run, _result(study, stack, index, losses, before, after, seconds))


def _result(
    study: Study,
    stack: Stack,
    index: int,
    losses: Losses,
    before: dict[str, Tensor],
    after: dict[bool, dict[str, Tensor]],
    seconds: float,
) -> dict[str, Any]:
    """What a run's file says; losses that are no number are null, as JSON has none for them."""

    def number(value: Tensor) -> float | None:
        return round(value.item(), 6) if value.isfinite() else None

    steps, broke_off = len(losses.values), int(losses.broke_off[index])
    curve = [number(part.mean()) for part in losses.values[:, index].cpu().split(CURVE_STEP) if len(part)]
    chosen = [number(value[index]) for value in after[True].values()]
    whole = broke_off < 0 and None not in chosen
    return {
        "title": ALL_METHODS[stack.runs[index].method].title,
        "parameters": stack.parameters_of(index),
        "encoder_parameters": ENCODER_PARAMETERS if study.with_condition else 0,
        "steps": steps,
        "broke_off_at_step": None if broke_off < 0 else broke_off,
        "curve": curve,
        "loss_at_start": {name: number(value[index]) for name, value in before.items()},
        "loss": {name: number(value[index]) for name, value in after[False].items()},
        "validation_loss": sum(value for value in chosen if value is not None) / len(chosen) if whole else None,
        "pack": {"runs": len(stack.runs), "seconds": round(seconds, 1)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if study.device.type == "cuda" else "CPU",
    }


def do_all(study: Study, options: argparse.Namespace, deadline: Callable[[float], bool]) -> None:
    """The learning rates, then everything with the best of them."""
    folder: Path = options.out
    _do_runs(study, tuning_runs(study.task, options.methods), options, deadline)
    rates = best_rates(read_results(folder, study.task))
    print(f"{study.task}: learning rates {rates}", flush=True)
    _do_runs(study, study_runs(study.task, rates, options.methods), options, deadline)


def _do_runs(study: Study, runs: Sequence[Run], options: argparse.Namespace, deadline: Callable[[float], bool]) -> None:
    for pack in packs(runs, options.out, options.pack):
        started = time.perf_counter()
        do_pack(study, pack, options.out, options.steps, deadline)
        names = ", ".join(dict.fromkeys(f"{run.method} {run.budget}" for run in pack))
        print(f"{study.task}: {len(pack)} runs in {time.perf_counter() - started:.0f} s ({names})", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, one file a run")
    parser.add_argument(
        "--task", choices=TASKS, action="append", help="one of the tasks (default: both, one after the other)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=ALL_METHODS, metavar="METHOD", help="some of them only", default=[*ALL_METHODS]
    )
    parser.add_argument("--pictures", type=Path, help="the file of pictures.py (default: OUT/pictures.npz)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--pack", type=int, default=120, help="runs trained at once (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing that would end later")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    limit = float("inf") if options.time_limit is None else options.time_limit

    def deadline(seconds: float) -> bool:
        return time.monotonic() - begun + seconds > limit

    torch.backends.cudnn.allow_tf32 = False  # float32 throughout, as on a CPU
    try:
        for task in options.task or TASKS:
            do_all(Study(task, options.pictures or options.out / "pictures.npz", options.device), options, deadline)
    except OutOfTime as stop:
        print(f"stopped: {stop}; the same command goes on from here", flush=True)


if __name__ == "__main__":
    main()
