"""Timing steps side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from trexport.backends import Device, Step
from trexport.progress import SILENT, Progress


def time_steps(
    steps: Mapping[str, Step], device: Device, *, warm_up: int, iterations: int, progress: Progress = SILENT
) -> dict[str, list[float]]:
    """The latencies of several steps, in milliseconds, in one run: after a warm-up, round by round, each step once a round,
    so that what slows the machine slows all of them.

    On CUDA each is timed by events around the queued work (device time, buffers resident); on the CPU by the wall clock.
    """
    latencies: dict[str, list[float]] = {name: [] for name in steps}
    with progress.task("measure", (warm_up + iterations) * len(steps)) as task:
        for round_ in range(warm_up + iterations):
            for name, step in steps.items():
                latency = _time_once(step, device)
                if round_ >= warm_up:
                    latencies[name].append(latency)
                task.advance(1)
    return latencies


def _time_once(step: Step, device: Device) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step.run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
