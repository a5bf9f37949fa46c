"""How fast the step could be on this device: what it must compute and move, over what the device was seen to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trexport.backends import Device
from trexport.io_spec import BYTES_OF, Dtype, ModelSpec
from trexport.models.base import Base
from trexport.models.model import DTYPES, empty_model, outputs_of, random_feeds

_REPEATS = 7


@final
@dataclass(frozen=True)
class Work:
    """What one step must do at least."""

    flops: int
    """Products and convolutions, a multiply-add counting as two."""
    size_bytes: int
    """Every weight read once, every input read and every output written once."""


@final
@dataclass(frozen=True)
class Ceiling:
    """What the device was seen to reach in this run."""

    flops_per_second: float
    """Of a square matrix product in the precision measured."""
    bytes_per_second: float
    """Of a large copy, read and written bytes both counted."""

    def least_ms(self, work: Work) -> float:
        """The time below which no step with this work can be."""
        return 1e3 * max(work.flops / self.flops_per_second, work.size_bytes / self.bytes_per_second)


def work_of(base: Base, spec: ModelSpec, sizes: Mapping[str, int], dtype: Dtype) -> Work:
    """Count the work of one step, on the meta device."""
    feeds = {name: tensor.to("meta") for name, tensor in random_feeds(spec, sizes).items()}
    model = empty_model(base.architecture)
    nn.Module.to(model, DTYPES[dtype])  # diffusers warns of its own `to`, though there is nothing to keep in float32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = outputs_of(model, feeds)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    activations = sum(tensor.numel() for tensor in [*outputs, *feeds.values()])
    return Work(counter.get_total_flops(), (parameters + activations) * BYTES_OF[dtype])


def measure_ceiling(device: Device, dtype: Dtype) -> Ceiling:
    """Measure the device: the fastest of a few matrix products, and of a few copies of more than its caches hold."""
    size = 8192 if device == "cuda" else 1536
    kind = DTYPES[dtype]
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    product = _fastest_seconds(lambda: a @ b, device)
    source = torch.empty((1 << 31) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    copy = _fastest_seconds(lambda: target.copy_(source), device)
    return Ceiling(2 * size**3 / product, 2 * source.numel() / copy)


def _fastest_seconds(work: Callable[[], object], device: Device) -> float:
    seconds: list[float] = []
    for _ in range(_REPEATS):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
