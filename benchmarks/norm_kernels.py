"""The group normalisations of a UNet alone: our Triton kernels with several tilings against the traffic's least time."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast, final
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from trexport.backends import Device, Step
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.io_spec import Dtype
from trexport.models.architectures import default_sizes, spec_of
from trexport.models.base import Base
from trexport.models.fused import FuseOptions, fuse_
from trexport.models.fused.join import join_norms_
from trexport.models.model import DTYPES, empty_model, first_output, random_feeds

REPEATS = 20
# slices, rows of a tile, rows of a tile of the second kernel, warps
_SPLITS = (
    (16, 32, 32, 4),
    (16, 64, 64, 8),
    (32, 32, 32, 4),
    (32, 32, 64, 4),
    (32, 16, 64, 4),
    (32, 64, 64, 8),
    (64, 16, 32, 4),
    (64, 32, 32, 4),
    (64, 32, 64, 4),
    (64, 64, 64, 8),
    (128, 32, 64, 4),
)
# (batch, channels, height, width), more channels of a concatenation, groups, residual, axes of the shift, SiLU, sum kept
Shape = tuple[tuple[int, ...], int, int, bool, int, bool, bool]


@final
class NamedStep(nn.Module):
    """The UNet as a function of named tensors, for `torch.export`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **feeds: Tensor) -> Tensor:
        return first_output(self.model, feeds)


def norms_of(base: Base) -> Counter[Shape]:
    """All group normalisations of one step, joined with what stands before them → how many there are; from shapes alone."""
    model = empty_model(base.architecture)
    fuse_(cast(Any, model), FuseOptions(kernels="triton"))
    feeds = random_feeds(spec_of(base.config, "fp32"), default_sizes(base.config))
    with torch.no_grad():
        program = torch.export.export(NamedStep(model), (), {name: tensor.to("meta") for name, tensor in feeds.items()})
    join_norms_(program)
    found: Counter[Shape] = Counter()
    for node in program.graph.nodes:
        if str(node.target) == "trexport.group_norm.default":
            x, shift, _, _, groups, _, silu = node.args
            found[_shape(x), 0, groups, False, _axes(shift), silu, False] += 1
        elif str(node.target) == "trexport.joined_group_norm.default":
            x, skip, shift, other, _, _, groups, _, silu = node.args
            more = 0 if other is None else _shape(other)[1]
            found[_shape(x), more, groups, skip is not None, _axes(shift), silu, True] += 1
    return found


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _axes(node: fx.Node | None) -> int:
    return 0 if node is None else node.meta["val"].dim()


def time_norms(base: Base, device: Device, dtype: Dtype) -> list[dict[str, Any]]:
    """Microseconds of each shape under each tiling, from CUDA graphs of many in a row (so the input is in the L2 cache
    where it fits, as behind a convolution), and the relative L2 to float64."""
    if device != "cuda":
        print({str(shape): count for shape, count in norms_of(base).items()})
        return []
    from trexport.models.fused.kernels import group_norm as kernels

    rows = []
    for shape, count in sorted(norms_of(base).items()):
        (batch, first, height, width), more, groups, has_skip, axes, silu, keep = shape
        channels = first + more

        def map_of(channels: int) -> Tensor:
            x = torch.randn(batch, channels, height, width, device=device, dtype=DTYPES[dtype])  # noqa: B023
            return x.contiguous(memory_format=torch.channels_last)

        x = map_of(first)
        skip = map_of(first) if has_skip else None
        other = map_of(more) if more else None
        shift = torch.randn((batch, first)[2 - axes :], device=device, dtype=x.dtype) if axes else None
        weight, bias = torch.randn(2, channels, device=device, dtype=x.dtype)
        steps: dict[str, Step] = {}
        for name, how in _tilings(height * width, groups, channels // groups).items():
            with mock.patch.object(kernels, "FORCED", how), torch.inference_mode():
                steps[name] = _graph(
                    lambda: kernels.normalised(x, skip, shift, other, weight, bias, groups, 1e-5, silu, keep=keep)  # noqa: B023
                )
        joined = x.double() if skip is None else x.double() + skip.double()
        joined = joined if shift is None else joined + shift.double()[..., None, None]
        joined = joined if other is None else torch.cat([joined, other.double()], 1)
        wanted = F.group_norm(joined, groups, weight.double(), bias.double(), 1e-5)
        wanted = F.silu(wanted) if silu else wanted
        latencies = time_steps(steps, device, warm_up=3, iterations=20)
        times = {name: Latency.of(values).median_ms * 1e3 / REPEATS for name, values in latencies.items()}
        worst = max(float((step.outputs["out"].double() - wanted).norm() / wanted.norm()) for step in steps.values())
        moved = sum(t.nbytes for t in (x, skip, other) if t is not None) + (1 + keep) * x.nbytes * channels // first
        print(
            f"{shape} x{count}: own {times['own']:.2f} µs of "
            f"{' '.join(f'{name} {us:.2f}' for name, us in sorted(times.items(), key=lambda item: item[1])[:5])}; "
            f"HBM floor {moved / 3.35e12 * 1e6:.2f}; error {worst:.1e}",
            flush=True,
        )
        rows.append({"shape": str(shape), "count": count, "microseconds": times, "relative_l2": worst})
    print(f"own choice: {sum(row['microseconds']['own'] * row['count'] for row in rows):.0f} µs a step")
    print(f"best of each: {sum(min(row['microseconds'].values()) * row['count'] for row in rows):.0f} µs a step")
    return rows


def _tilings(rows: int, groups: int, width: int) -> dict[str, Any]:
    """What the kernels choose themselves, and others: two passes (p elements x warps), two kernels
    (slices s, rows r, rows of the second l, warps w)."""
    from trexport.models.fused.kernels.group_norm import Tiling, groups_together

    lanes = 2 ** (width - 1).bit_length()
    chosen: dict[str, Any] = {"own": None}
    if rows * lanes > 16384:
        for elements, warps in ((4096, 8), (8192, 8), (16384, 16)):
            chosen[f"p{elements}x{warps}"] = Tiling(elements // lanes, 1, warps)
        together = groups_together(groups, width, 128)
        for splits, lines, last, warps in _SPLITS:
            chosen[f"s{splits}r{lines}l{last}w{warps}"] = Tiling(lines, together, warps, splits, last_rows=last)
    else:
        tile = 2 ** (rows - 1).bit_length()
        for warps in (4, 16):
            chosen[f"x{warps}"] = Tiling(tile, 1, warps, in_registers=True)
    return chosen


def _graph(call: Any) -> Step:
    _, out = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            _, out = call()
    return Step(graph.replay, {}, {"out": out})
