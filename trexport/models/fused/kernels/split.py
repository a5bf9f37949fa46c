# pyright: reportMissingImports=false, reportIndexIssue=false
"""Group normalisation in two kernels, for many programs: statistics of slices of rows, then all else."""

from __future__ import annotations

import triton
import triton.language as tl

from trexport.models.fused.kernels.tile import (
    channel_sums,
    finished,
    group_sums,
    joined_tile,
    members,
    moved_by,
    of_channels,
)


@triton.jit
def statistics_kernel(
    x,
    skip,
    shift,
    other,
    joined,
    means,
    squares,
    rows,
    shift_stride,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Program (block of channels, slice, sample) → `means` and `squares` (sums of squared deviations), both
    (batch, groups, SPLITS). TILES tiles hold a slice; 0 where their number is not known at the build."""
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK_CHANNELS)
    channels = tl.program_id(0) * (TOGETHER * WIDTH) + columns
    inside = (columns < TOGETHER * WIDTH) & (channels < CHANNELS)
    moved = moved_by(shift, sample, shift_stride, channels, inside, FIRST, HAS_SHIFT)
    per_split = tl.cdiv(rows, SPLITS)
    count = tl.maximum(tl.minimum(rows - split * per_split, per_split), 0)
    start = sample * rows + split * per_split
    mean, deviation = channel_sums(
        x, skip, other, joined, moved, start, count, channels, inside, FIRST, CHANNELS, BLOCK_ROWS, TILES, HAS_SKIP,
        HAS_OTHER, KEEP,
    )  # fmt: skip
    member = members(BLOCK_GROUPS, BLOCK_CHANNELS, WIDTH)
    group_mean, group_squares = group_sums(mean, deviation, count, member, WIDTH)
    inner = tl.arange(0, BLOCK_GROUPS)
    group = tl.program_id(0) * TOGETHER + inner
    wanted = (inner < TOGETHER) & (group < CHANNELS // WIDTH)
    place = (sample * (CHANNELS // WIDTH) + group) * SPLITS + split
    tl.store(means + place, group_mean, mask=wanted)
    tl.store(squares + place, group_squares, mask=wanted)


@triton.jit
def normalise_kernel(
    x,
    skip,
    shift,
    other,
    weight,
    bias,
    means,
    squares,
    out,
    rows,
    shift_stride,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    SILU: tl.constexpr,
):
    """Program (block of channels, block of rows, sample)."""
    sample = tl.program_id(2).to(tl.int64)
    start = sample * rows
    columns = tl.arange(0, BLOCK_CHANNELS)
    channels = tl.program_id(0) * (TOGETHER * WIDTH) + columns
    inside = (columns < TOGETHER * WIDTH) & (channels < CHANNELS)
    lines = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (lines < rows)[:, None] & inside[None, :]
    moved = moved_by(shift, sample, shift_stride, channels, inside, FIRST, HAS_SHIFT)
    values = joined_tile(
        x, skip, other, moved, start, lines, channels, mask, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, False
    )
    scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    # all slices of the groups, combined
    inner = tl.arange(0, BLOCK_GROUPS)
    group = tl.program_id(0) * TOGETHER + inner
    wanted = ((inner < TOGETHER) & (group < CHANNELS // WIDTH))[:, None]
    split = tl.arange(0, SPLITS)
    place = ((sample * (CHANNELS // WIDTH) + group) * SPLITS)[:, None] + split[None, :]
    part_mean = tl.load(means + place, mask=wanted, other=0.0)
    part_squares = tl.load(squares + place, mask=wanted, other=0.0)
    per_split = tl.cdiv(rows, SPLITS)
    counts = tl.maximum(tl.minimum(rows - split * per_split, per_split), 0).to(tl.float32)
    group_mean = tl.sum(part_mean * counts[None, :], axis=1) / rows
    between = part_mean - group_mean[:, None]
    variance = tl.sum(part_squares + counts[None, :] * WIDTH * between * between, axis=1) / (rows * WIDTH)
    member = members(BLOCK_GROUPS, BLOCK_CHANNELS, WIDTH)
    mean = of_channels(group_mean, member)
    scale *= of_channels(tl.rsqrt(variance + EPS), member)
    y = finished(values - mean[None, :], scale, offset, SILU)
    places = start * CHANNELS + lines[:, None] * CHANNELS + channels[None, :]
    tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)
