# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton is not installed on machines without a GPU)
"""Group normalisation of channels-last tensors, with a shift before and SiLU after, in Triton.

Statistics are float32. Where one program can hold a group's part of a sample, one kernel does all, in two passes over
registers. Greater maps take two kernels: partial statistics of slices of rows, then the combination of the slices and the
normalisation. Sums are shifted by a value of the slice itself, so that a mean far from zero cancels nothing, and parts are
combined by Chan, Golub and LeVeque's formula ("Updating formulae and a pairwise algorithm for computing sample variances",
1979).

EPS is a constant of a kernel and no argument: Inductor passes a Python float as float64, and with one such term the rest of
the kernel is float64 too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_WHOLE = 32768
"""Most elements of a tile for which one kernel does all."""
_CHANNELS = 128
"""Aim of a tile's width: one row of it is 256 bytes in half precision."""
_ROWS = 32
_SPLITS = 32
"""Slices of a sample's rows in the kernel of partial statistics."""


@triton.jit
def _members(BLOCK_GROUPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """(groups, channels) of a tile: whether the channel is of the group."""
    return tl.arange(0, BLOCK_GROUPS)[:, None] == (tl.arange(0, BLOCK_CHANNELS) // WIDTH)[None, :]


@triton.jit
def _finish(values, scale, bias, SILU: tl.constexpr):
    """(rows, channels) of centred values → the output's."""
    y = values * scale[None, :] + bias[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _whole_kernel(
    x,
    shift,
    weight,
    bias,
    out,
    rows,
    shift_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
):
    """Program (block of channels, sample): all rows of some groups."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (TOGETHER * WIDTH)
    columns = tl.arange(0, BLOCK_CHANNELS)
    inside = (columns < TOGETHER * WIDTH) & (first + columns < CHANNELS)
    lines = tl.arange(0, BLOCK_ROWS)
    mask = (lines < rows)[:, None] & inside[None, :]
    offsets = sample * rows * CHANNELS + first + lines[:, None] * CHANNELS + columns[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + first + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + first + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        moved = tl.load(shift + sample * shift_stride + first + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(mask, values + moved[None, :], 0.0)
    member = _members(BLOCK_GROUPS, BLOCK_CHANNELS, WIDTH)
    count = rows * WIDTH
    totals = tl.sum(tl.where(member, tl.sum(values, axis=0)[None, :], 0.0), axis=1) / count
    mean = tl.sum(tl.where(member, totals[:, None], 0.0), axis=0)
    values = tl.where(mask, values - mean[None, :], 0.0)
    squares = tl.sum(tl.where(member, tl.sum(values * values, axis=0)[None, :], 0.0), axis=1) / count
    inverse = tl.sum(tl.where(member, tl.rsqrt(squares + EPS)[:, None], 0.0), axis=0)
    y = _finish(values, scale * inverse, offset, SILU)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(sums, squares, base, pivot, start, count, inside, CHANNELS: tl.constexpr):
    """`sums` and `squares` with those of one tile of rows, from `start`, less `pivot`."""
    BLOCK_ROWS: tl.constexpr = sums.shape[0]
    lines = start + tl.arange(0, BLOCK_ROWS)
    mask = (lines < count)[:, None] & inside[None, :]
    places = lines[:, None] * CHANNELS + tl.arange(0, sums.shape[1])[None, :]
    values = tl.load(base + places, mask=mask, other=0.0).to(tl.float32)
    values = tl.where(mask, values - pivot[None, :], 0.0)
    return sums + values, squares + values * values


@triton.jit
def _statistics_kernel(
    x,
    shift,
    means,
    squares,
    rows,
    shift_stride,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Program (block of channels, slice, sample) → `means` and `squares` (sums of squared deviations), both
    (batch, GROUPS, SPLITS). `TILES` tiles hold a slice; 0 where their number is not known at the build."""
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * (TOGETHER * WIDTH)
    columns = tl.arange(0, BLOCK_CHANNELS)
    inside = (columns < TOGETHER * WIDTH) & (first + columns < CHANNELS)
    per_split = tl.cdiv(rows, SPLITS)
    count = tl.maximum(tl.minimum(rows - split * per_split, per_split), 0)
    base = x + (sample * rows + split * per_split) * CHANNELS + first
    pivot = tl.load(base + columns, mask=inside & (count > 0), other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], dtype=tl.float32)
    sums_of_squares = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], dtype=tl.float32)
    if TILES > 0:
        for tile in tl.static_range(TILES):
            start = tile * BLOCK_ROWS
            sums, sums_of_squares = _add(sums, sums_of_squares, base, pivot, start, count, inside, CHANNELS)
    else:
        start = tl.zeros((), dtype=tl.int32)
        while start < count:
            sums, sums_of_squares = _add(sums, sums_of_squares, base, pivot, start, count, inside, CHANNELS)
            start += BLOCK_ROWS
    number = tl.maximum(count, 1).to(tl.float32)
    total = tl.sum(sums, axis=0)
    mean = pivot + total / number
    deviation = tl.maximum(tl.sum(sums_of_squares, axis=0) - total * total / number, 0.0)
    if HAS_SHIFT:
        mean += tl.load(shift + sample * shift_stride + first + columns, mask=inside, other=0.0).to(tl.float32)
    # the channels of a group have as many rows each
    member = _members(BLOCK_GROUPS, BLOCK_CHANNELS, WIDTH)
    group_mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1) / WIDTH
    between = tl.where(member, mean[None, :] - group_mean[:, None], 0.0)
    group_squares = tl.sum(tl.where(member, deviation[None, :], 0.0) + count * between * between, axis=1)
    inner = tl.arange(0, BLOCK_GROUPS)
    group = tl.program_id(0) * TOGETHER + inner
    wanted = (inner < TOGETHER) & (group < GROUPS)
    place = (sample * GROUPS + group) * SPLITS + split
    tl.store(means + place, group_mean, mask=wanted)
    tl.store(squares + place, group_squares, mask=wanted)


@triton.jit
def _normalise_kernel(
    x,
    shift,
    weight,
    bias,
    means,
    squares,
    out,
    rows,
    shift_stride,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
):
    """Program (block of channels, block of rows, sample)."""
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * (TOGETHER * WIDTH)
    columns = tl.arange(0, BLOCK_CHANNELS)
    inside = (columns < TOGETHER * WIDTH) & (first + columns < CHANNELS)
    lines = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (lines < rows)[:, None] & inside[None, :]
    offsets = sample * rows * CHANNELS + first + lines[:, None] * CHANNELS + columns[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + first + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + first + columns, mask=inside, other=0.0).to(tl.float32)
    # all slices of the groups, combined
    inner = tl.arange(0, BLOCK_GROUPS)
    group = tl.program_id(0) * TOGETHER + inner
    wanted = ((inner < TOGETHER) & (group < GROUPS))[:, None]
    split = tl.arange(0, SPLITS)
    place = ((sample * GROUPS + group) * SPLITS)[:, None] + split[None, :]
    part_mean = tl.load(means + place, mask=wanted, other=0.0)
    part_squares = tl.load(squares + place, mask=wanted, other=0.0)
    per_split = tl.cdiv(rows, SPLITS)
    counts = tl.maximum(tl.minimum(rows - split * per_split, per_split), 0).to(tl.float32)
    group_mean = tl.sum(part_mean * counts[None, :], axis=1) / rows
    between = part_mean - group_mean[:, None]
    variance = tl.sum(part_squares + counts[None, :] * WIDTH * between * between, axis=1) / (rows * WIDTH)
    # a value of each group, for each of its channels
    member = _members(BLOCK_GROUPS, BLOCK_CHANNELS, WIDTH)
    mean = tl.sum(tl.where(member, group_mean[:, None], 0.0), axis=0)
    inverse = tl.sum(tl.where(member, tl.rsqrt(variance + EPS)[:, None], 0.0), axis=0)
    if HAS_SHIFT:
        mean -= tl.load(shift + sample * shift_stride + first + columns, mask=inside, other=0.0).to(tl.float32)
    y = _finish(values - mean[None, :], scale * inverse, offset, SILU)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)


def groups_together(groups: int, width: int, channels: int = _CHANNELS) -> int:
    """How many groups of `width` channels a tile takes: at most about `channels` of them, and such that few of the tile's
    lanes, a power of two, are idle."""
    most = max(1, min(groups, channels // width))
    return max(range(1, most + 1), key=lambda n: (n * width / triton.next_power_of_2(n * width) > 0.9, n))


@triton_op("trexport::group_norm", mutates_args={})
def group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """`silu(group_norm(x + shift))`.

    Args:
        x: (batch, channels, height, width), float32, float16 or bfloat16; made channels-last where it is not.
        shift: (batch, channels), rows of any stride, or None.
        weight, bias: (channels,).
        groups: of channels; divides their number.
        eps: added to the variance.
        silu: apply SiLU at the end.

    Returns:
        as `x`, channels-last.
    """
    batch, channels, height, columns = x.shape
    rows = height * columns
    width = channels // groups
    x = x.contiguous(memory_format=torch.channels_last)
    # not `empty_like(x)`: Inductor writes NaN over all of a channels-last one first, in a kernel of its own
    out = torch.empty(batch, height, columns, channels, dtype=x.dtype, device=x.device)
    has_shift = shift is not None
    stride = shift.stride(0) if shift is not None else 0
    moved = shift if shift is not None else weight  # never read then
    lanes = triton.next_power_of_2(width)
    known_rows = rows if isinstance(rows, int) else _WHOLE  # sizes that are free at the build take the general way
    if triton.next_power_of_2(known_rows) * lanes <= _WHOLE:
        tile = triton.next_power_of_2(known_rows)
        together = groups_together(groups, width, min(_CHANNELS // 2, _WHOLE // 4 // tile))
        wrap_triton(_whole_kernel)[(triton.cdiv(groups, together), batch)](
            x,
            moved,
            weight,
            bias,
            out,
            rows,
            stride,
            CHANNELS=channels,
            WIDTH=width,
            TOGETHER=together,
            BLOCK_GROUPS=triton.next_power_of_2(together),
            BLOCK_CHANNELS=triton.next_power_of_2(together * width),
            BLOCK_ROWS=tile,
            EPS=eps,
            HAS_SHIFT=has_shift,
            SILU=silu,
            num_warps=16 if tile * lanes > _WHOLE // 2 else 8,
        )
        return out.permute(0, 3, 1, 2)
    together = groups_together(groups, width)
    blocks = triton.cdiv(groups, together)
    means = torch.empty(batch, groups, _SPLITS, dtype=torch.float32, device=x.device)
    squares = torch.empty_like(means)
    tiles = triton.cdiv(triton.cdiv(rows, _SPLITS), _ROWS) if isinstance(rows, int) else 0
    wrap_triton(_statistics_kernel)[(blocks, _SPLITS, batch)](
        x,
        moved,
        means,
        squares,
        rows,
        stride,
        CHANNELS=channels,
        GROUPS=groups,
        WIDTH=width,
        TOGETHER=together,
        BLOCK_GROUPS=triton.next_power_of_2(together),
        BLOCK_CHANNELS=triton.next_power_of_2(together * width),
        BLOCK_ROWS=_ROWS,
        TILES=tiles,
        SPLITS=_SPLITS,
        HAS_SHIFT=has_shift,
        num_warps=4,
    )
    wrap_triton(_normalise_kernel)[(blocks, triton.cdiv(rows, _ROWS), batch)](
        x,
        moved,
        weight,
        bias,
        means,
        squares,
        out,
        rows,
        stride,
        CHANNELS=channels,
        GROUPS=groups,
        WIDTH=width,
        TOGETHER=together,
        BLOCK_GROUPS=triton.next_power_of_2(together),
        BLOCK_CHANNELS=triton.next_power_of_2(together * width),
        BLOCK_ROWS=_ROWS,
        SPLITS=_SPLITS,
        EPS=eps,
        HAS_SHIFT=has_shift,
        SILU=silu,
        num_warps=4,
    )
    return out.permute(0, 3, 1, 2)
