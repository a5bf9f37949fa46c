# pyright: reportMissingImports=false
# (Triton is not installed on machines without a GPU)
"""Group normalisation of channels-last tensors in Triton, with what stands before it (a residual, a shift of each channel, a
concatenation) and SiLU behind.

Statistics are float32. Sums are shifted by a value of the map itself, so that a mean far from zero cancels nothing, and
parts are combined by Chan, Golub and LeVeque's formula ("Updating formulae and a pairwise algorithm for computing sample
variances", 1979). How the work is divided is chosen from the shape, see `tiling`.

What Inductor must not be given: a float as an argument (it passes float64, and the kernel computes in it; EPS is a
constant), and `empty_like` of a channels-last tensor (it writes NaN all over it first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from trexport.models.fused.kernels.slab import slab_kernel
from trexport.models.fused.kernels.split import normalise_kernel, statistics_kernel


@final
@dataclass(frozen=True)
class Tiling:
    """How a normalisation is divided among programs."""

    rows: int
    """Of a tile; a power of two."""
    together: int
    """Groups of a tile."""
    warps: int
    splits: int = 0
    """Slices of rows with statistics of their own, in a kernel before; 0: one program takes all rows of its groups."""
    in_registers: bool = False
    """A tile has all rows."""
    last_rows: int | None = None
    """Of a tile of the second kernel; as `rows` where it is None."""


_IN_REGISTERS = 32768
"""Most elements of a tile that holds all rows, idle lanes included."""
_USED = 20480
"""Most of them that are not idle: with more, slices of rows were faster (`benchmarks/NOTES.md`)."""
_PASSING = 8192
"""Elements of a tile where all rows pass through twice."""
_WRITTEN_OUT = 8
"""Most tiles of a slice whose code stands one after another, so that they are loaded together; more are a loop."""
_ENOUGH = 512
"""With so many programs rows are not divided: some for each of an H100's 132 multiprocessors."""
_WIDE = 128
"""Aim of a tile's channels where rows are divided: one row of it is 256 bytes in half precision."""
_SPLIT_ROWS = 32
_MANY_ROWS = 2048
"""From here on rows are divided into more slices, and the second kernel's tiles are higher."""

FORCED: Tiling | None = None
"""What the benchmark of the kernels tries in the place of `tiling`'s choice."""


def tiling(batch: int | torch.SymInt, rows: int | torch.SymInt, groups: int, width: int) -> Tiling:
    """For `groups` groups of `width` channels. Sizes that are free at the build are taken for great ones."""
    lanes = triton.next_power_of_2(width)
    if isinstance(rows, int) and triton.next_power_of_2(rows) * lanes <= _IN_REGISTERS and rows * width <= _USED:
        tile = triton.next_power_of_2(rows)
        together = groups_together(groups, width, min(_WIDE // 2, _IN_REGISTERS // 4 // tile))
        return Tiling(tile, together, 16 if tile * lanes > _IN_REGISTERS // 2 else 8, in_registers=True)
    if isinstance(batch, int) and batch * groups < _ENOUGH:
        many = not isinstance(rows, int) or rows >= _MANY_ROWS
        splits, last = (32, 64) if many else (16, 32)
        return Tiling(_SPLIT_ROWS, groups_together(groups, width, _WIDE), 4, splits, last_rows=last)
    return Tiling(max(1, _PASSING // lanes), 1, 16)


def groups_together(groups: int, width: int, channels: int) -> int:
    """How many groups of `width` channels a tile takes: at most about `channels` of them, and such that few of the tile's
    lanes, a power of two, are idle."""
    most = max(1, min(groups, channels // width))
    return max(range(1, most + 1), key=lambda n: (n * width / triton.next_power_of_2(n * width) > 0.9, n))


def normalised(
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    *,
    keep: bool,
) -> tuple[Tensor | None, Tensor]:
    """What is normalised, None unless `keep`, and its normalisation: the function of `trexport.models.fused.ops`, for
    float32, float16 and bfloat16 on CUDA, and in Triton's interpreter."""
    batch, first, height, columns = x.shape
    channels = first + (0 if other is None else other.shape[1])
    rows = height * columns
    width = channels // groups
    x = x.contiguous(memory_format=torch.channels_last)
    skip, other = (None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (skip, other))
    out = torch.empty(batch, height, columns, channels, dtype=x.dtype, device=x.device)
    joined = torch.empty_like(out) if keep else None
    # in the place of what is not there stands something that is never touched
    given = {
        "x": x,
        "skip": weight if skip is None else skip,
        "shift": weight if shift is None else shift,
        "other": weight if other is None else other,
        "joined": weight if joined is None else joined,
    }
    stride = 0 if shift is None or shift.dim() == 1 else shift.stride(0)
    how = FORCED or tiling(batch, rows, groups, width)
    sizes = {
        "FIRST": first,
        "CHANNELS": channels,
        "WIDTH": width,
        "TOGETHER": how.together,
        "BLOCK_GROUPS": triton.next_power_of_2(how.together),
        "BLOCK_CHANNELS": triton.next_power_of_2(how.together * width),
        "BLOCK_ROWS": how.rows,
        "HAS_SKIP": skip is not None,
        "HAS_SHIFT": shift is not None,
        "HAS_OTHER": other is not None,
        "num_warps": how.warps,
    }
    blocks = triton.cdiv(groups, how.together)
    if not how.splits:
        wrap_triton(slab_kernel)[(blocks, batch)](
            **given,
            weight=weight,
            bias=bias,
            out=out,
            rows=rows,
            shift_stride=stride,
            **sizes,
            IN_REGISTERS=how.in_registers,
            EPS=eps,
            KEEP=keep,
            SILU=silu,
        )
        return None if joined is None else _channels_first(joined), _channels_first(out)
    means = torch.empty(batch, groups, how.splits, dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    wrap_triton(statistics_kernel)[(blocks, how.splits, batch)](
        **given,
        means=means,
        squares=squares,
        rows=rows,
        shift_stride=stride,
        **sizes,
        TILES=_tiles(rows, how),
        SPLITS=how.splits,
        KEEP=keep,
    )
    del given["joined"]
    if joined is not None:
        given = dict.fromkeys(given, weight) | {"x": joined}
        sizes |= {"FIRST": channels, "HAS_SKIP": False, "HAS_SHIFT": False, "HAS_OTHER": False}
    last_rows = how.last_rows or how.rows
    sizes["BLOCK_ROWS"] = last_rows
    wrap_triton(normalise_kernel)[(blocks, triton.cdiv(rows, last_rows), batch)](
        **given,
        weight=weight,
        bias=bias,
        means=means,
        squares=squares,
        out=out,
        rows=rows,
        shift_stride=stride,
        **sizes,
        SPLITS=how.splits,
        EPS=eps,
        SILU=silu,
    )
    return None if joined is None else _channels_first(joined), _channels_first(out)


def _tiles(rows: int | torch.SymInt, how: Tiling) -> int:
    """How many tiles hold a slice of rows, 0 where it is a loop."""
    tiles = triton.cdiv(triton.cdiv(rows, how.splits), how.rows) if isinstance(rows, int) else 0
    return tiles if tiles <= _WRITTEN_OUT else 0


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
