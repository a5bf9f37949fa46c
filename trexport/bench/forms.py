"""Which form of an artifact wins: merged, factored, a bank, swappable. By swaps an hour, and by adapters in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from trexport.adapter_file import factored_of, slots_of
from trexport.artifact import Artifact
from trexport.backends import Device, EngineFile, OnnxFile, TorchModel
from trexport.bench.report import BackendResult
from trexport.errors import UsageError
from trexport.models.adapters import BoundAdapter
from trexport.session.form import AbstractBank
from trexport.session.forms import form_of
from trexport.session.sources import chosen_in_bank, source_in_session

_HOUR_MS = 3.6e6


@final
@dataclass(frozen=True)
class FormCost:
    """What a form costs."""

    form: str
    step_ms: float
    swap_ms: float
    """To go on with another adapter: of a merged model, loading another one."""
    model_bytes: int
    """Of the artifact's files, and what a bank holds for its samples."""
    adapter_bytes: int
    """That each adapter adds in memory: of a merged model, a model."""
    swapped_by: str | None = None
    """What wrote the weights, of forms that write them."""


@final
@dataclass(frozen=True)
class FormsReport:
    """The forms side by side, and where one overtakes another."""

    costs: Sequence[FormCost]
    winners: Sequence[tuple[float, str]]
    """From so many swaps an hour on, this form does the most steps on a busy device, until the next one's number."""
    adapters: Mapping[str, int]
    """Form → from so many adapters in memory on it needs less than a merged model for each."""


def report_forms(costs: Sequence[FormCost]) -> FormsReport:
    """Work out the winners: in an hour with S swaps a form does `(hour − S·swap) / step` steps, a line in S; who wins is the
    upper envelope of these lines."""
    lines = {cost.form: (_HOUR_MS / cost.step_ms, cost.swap_ms / cost.step_ms) for cost in costs}
    winners: list[tuple[float, str]] = []
    now, swaps = max(lines, key=lambda form: (lines[form][0], -lines[form][1])), 0.0
    while True:
        winners.append((swaps, now))
        steps, slope = lines[now]
        crossings = [
            (max(swaps, (steps - other) / (slope - flatter)), -other, form)
            for form, (other, flatter) in lines.items()
            if flatter < slope
        ]
        crossings = [item for item in crossings if item[0] * slope < steps]  # later there is no time for a step at all
        if not crossings:
            break
        swaps, _, now = min(crossings)
    merged = next((cost for cost in costs if cost.form == "merged"), None)
    fewer: dict[str, int] = {}
    for cost in costs:
        if merged is not None and cost.form != "merged" and merged.model_bytes > cost.adapter_bytes:
            fewer[cost.form] = int(cost.model_bytes // (merged.model_bytes - cost.adapter_bytes)) + 1
    return FormsReport(costs, winners, fewer)


def form_name(artifact: Artifact) -> str:
    """`merged`, `factored`, `bank of K` or `swappable`."""
    if artifact.manifest.factored is None:
        return artifact.manifest.form
    bank = factored_of(artifact).bank
    return "factored" if bank is None else f"bank of {bank}"


def file_for(
    artifact: Artifact, adapters: Sequence[BoundAdapter], device: Device, chosen: Sequence[int | None] | None = None
) -> OnnxFile | EngineFile:
    """An artifact with adapters active, as a backend takes it and a session runs it.

    Args:
        chosen: of a bank, the numbers of adapters, from 0, one for each sample; the first one for all unless given.

    Raises:
        UsageError: an artifact that torch runs.
    """
    source = source_in_session(artifact, adapters, device, chosen)
    if isinstance(source, TorchModel):
        raise UsageError(
            f"{artifact.folder}: a UNet for torch, expected an artifact of trexport onnx or trexport engine"
        )
    return replace(source, constants={**source.constants, **chosen_in_bank(artifact, adapters, chosen)})


def cost_of(artifact: Artifact, adapters: Sequence[BoundAdapter], device: Device, result: BackendResult) -> FormCost:
    """What a form costs: its step is measured already, a swap is measured here, with the median of five.

    Args:
        adapters: those that are swapped in.
    """
    model = sum((artifact.folder / name).stat().st_size for name in artifact.manifest.files)
    form = form_of(artifact, device)
    if form is None:
        return FormCost(form_name(artifact), result.latency.median_ms, 1e3 * result.load_seconds, model, model)
    prepared = [(form.prepare(adapter.name, adapter), adapter.strength) for adapter in adapters]
    times = []
    for _ in range(5):
        form.write([])
        _finish(device)
        start = time.perf_counter()
        if isinstance(form, AbstractBank):
            form.rewrite(*prepared[0])
        else:
            form.write(prepared)
        _finish(device)
        times.append(1e3 * (time.perf_counter() - start))
    if isinstance(form, AbstractBank):
        model += form.sample_bytes()
        size = form.adapter_bytes()
    else:
        size = sum(tensor.nbytes for tensor in slots_of(artifact)[0].neutral().values())
    by = None if form.report is None else str(form.report)
    return FormCost(form_name(artifact), result.latency.median_ms, statistics.median(times), model, size, by)


def _finish(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
