"""The group normalisations of a UNet alone: our Triton kernels with several tilings against the traffic's least time."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from trexport.backends import Device, Step
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.io_spec import Dtype, default_sizes, unet_spec
from trexport.models.base import Base
from trexport.models.fused import FuseOptions, fuse_
from trexport.models.fused.norm import GroupNormAct
from trexport.models.unet import DTYPES, call_unet, empty_unet, random_feeds

REPEATS = 20
# limit of the single kernel, rows of a tile, slices, aim of a tile's width
TILINGS = [
    (32768, 32, 32, 128),
    (0, 32, 32, 128),
    (0, 16, 32, 128),
    (0, 64, 32, 128),
    (0, 32, 16, 128),
    (0, 32, 64, 128),
    (0, 32, 32, 64),
]

Shape = tuple[int, int, int, int, int, bool, bool]


def norms_of(base: Base) -> Counter[Shape]:
    """(batch, channels, height, width, groups, shift, SiLU) of all group normalisations in one step → how many there are;
    from shapes alone."""
    model = empty_unet(base.config)
    fuse_(model, FuseOptions(("group_norm",)))
    found: Counter[Shape] = Counter()

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        norm = cast(GroupNormAct, module)
        batch, channels, height, width = inputs[0].shape
        found[batch, channels, height, width, norm.num_groups, len(inputs) > 1, norm.silu] += 1

    for module in model.modules():
        if isinstance(module, GroupNormAct):
            module.register_forward_pre_hook(hook)
    feeds = random_feeds(unet_spec(base.config, "fp32"), default_sizes(base.config))
    with torch.no_grad():
        call_unet(model, {name: tensor.to("meta") for name, tensor in feeds.items()})
    return found


def time_norms(base: Base, device: Device, dtype: Dtype) -> list[dict[str, Any]]:
    """Microseconds of each shape under each tiling, from CUDA graphs of many in a row (so the input is in the L2 cache
    where it fits, as behind a convolution), and the relative L2 to float64."""
    if device != "cuda":
        print({str(shape): count for shape, count in norms_of(base).items()})
        return []
    from trexport.models.fused.kernels import group_norm as kernels

    rows = []
    for shape, count in sorted(norms_of(base).items()):
        batch, channels, height, width, groups, shifted, silu = shape
        x = torch.randn(batch, channels, height, width, device=device, dtype=DTYPES[dtype])
        x = x.contiguous(memory_format=torch.channels_last)
        shift = torch.randn(batch, channels, device=device, dtype=x.dtype) if shifted else None
        weight, bias = torch.randn(2, channels, device=device, dtype=x.dtype)
        steps: dict[str, Step] = {}
        for limit, lines, splits, aim in TILINGS:
            changed = mock.patch.multiple(kernels, _WHOLE=limit, _ROWS=lines, _SPLITS=splits, _CHANNELS=aim)
            with changed, torch.inference_mode():
                steps[f"{limit}/{lines}/{splits}/{aim}"] = _graph(
                    lambda: kernels.group_norm(x, shift, weight, bias, groups, 1e-5, silu)  # noqa: B023
                )
        wide = x.double() + (0 if shift is None else shift.double()[:, :, None, None])
        wanted = F.group_norm(wide, groups, weight.double(), bias.double(), 1e-5)
        wanted = F.silu(wanted) if silu else wanted
        latencies = time_steps(steps, device, warm_up=3, iterations=20)
        times = {name: Latency.of(values).median_ms * 1e3 / REPEATS for name, values in latencies.items()}
        worst = max(float((step.outputs["out"].double() - wanted).norm() / wanted.norm()) for step in steps.values())
        best = sorted(times.items(), key=lambda item: item[1])[:4]
        least = 2 * x.nbytes / 3.35e12 * 1e6
        print(
            f"{shape} x{count}: {' '.join(f'{name} {us:.2f}' for name, us in best)} µs; "
            f"whole {times.get('32768/32/32/128', 0):.2f}, split {times['0/32/32/128']:.2f}; "
            f"HBM floor {least:.2f}; error {worst:.1e}",
            flush=True,
        )
        rows.append({"shape": list(shape), "count": count, "microseconds": times, "relative_l2": worst})
    for name in rows[0]["microseconds"]:
        print(f"{name}: {sum(row['microseconds'][name] * row['count'] for row in rows):.0f} µs a step")
    print(f"best of each: {sum(min(row['microseconds'].values()) * row['count'] for row in rows):.0f} µs a step")
    return rows


def _graph(call: Any) -> Step:
    out = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            out = call()
    return Step(graph.replay, {}, {"out": out})
