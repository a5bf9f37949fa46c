"""Requests taken apart into samples, samples put together into runs, and the answers put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

Choice = tuple[tuple[str, float | None], ...]
"""The adapters of one sample with their strengths, None for the adapter's own."""


@final
@dataclass(frozen=True)
class Row:
    """One sample of one request."""

    request: int
    feeds: Mapping[str, Tensor]
    """Inputs without their batch axis."""
    choice: Choice = ()


@final
@dataclass(frozen=True)
class Limits:
    """What may run together."""

    samples: int
    """At most."""
    bank: int | None = None
    """How many different adapters one run may mix; None where all samples of a run have the same."""
    timesteps: bool = True
    """Whether samples of one run may be at different timesteps."""


def runs_of(rows: Sequence[Row], limits: Limits, active: Choice | None = ()) -> list[list[Row]]:
    """Rows that run together, in the order of running: those with what is `active` first, then as they came."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row, limits), []).append(row)
    found = [run for group in groups.values() for run in _split(group, limits)]
    if limits.bank is None:
        found.sort(key=lambda run: run[0].choice != active)
    return found


def feeds_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """New tensors, with a batch axis, of rows that run together."""
    return {name: torch.stack([row.feeds[name] for row in rows]) for name in rows[0].feeds}


def _key(row: Row, limits: Limits) -> tuple[object, ...]:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in row.feeds.items())
    timestep = None if limits.timesteps else row.feeds["timestep"].item()
    return shapes, timestep, None if limits.bank is not None else row.choice


def _split(rows: Sequence[Row], limits: Limits) -> list[list[Row]]:
    runs: list[list[Row]] = []
    names: set[str] = set()
    for row in rows:
        more = names | {name for name, _ in row.choice}
        full = not runs or len(runs[-1]) == limits.samples or (limits.bank is not None and len(more) > limits.bank)
        if full:
            runs.append([])
            more = {name for name, _ in row.choice}
        runs[-1].append(row)
        names = more
    return runs
