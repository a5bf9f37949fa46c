# pyright: reportMissingImports=false, reportIndexIssue=false
"""Group normalisation where one program has all rows of some groups of a sample: in registers, or in two passes."""

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
def slab_kernel(
    x,
    skip,
    shift,
    other,
    weight,
    bias,
    joined,
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
    IN_REGISTERS: tl.constexpr,
    EPS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    KEEP: tl.constexpr,
    SILU: tl.constexpr,
):
    """Program (block of channels, sample). IN_REGISTERS: a tile holds all rows."""
    sample = tl.program_id(1).to(tl.int64)
    start = sample * rows
    columns = tl.arange(0, BLOCK_CHANNELS)
    channels = tl.program_id(0) * (TOGETHER * WIDTH) + columns
    inside = (columns < TOGETHER * WIDTH) & (channels < CHANNELS)
    moved = moved_by(shift, sample, shift_stride, channels, inside, FIRST, HAS_SHIFT)
    member = members(BLOCK_GROUPS, BLOCK_CHANNELS, WIDTH)
    number = rows * WIDTH
    lines = tl.arange(0, BLOCK_ROWS)
    scale = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    if IN_REGISTERS:
        mask = (lines < rows)[:, None] & inside[None, :]
        places = start * CHANNELS + lines[:, None] * CHANNELS + channels[None, :]
        values = joined_tile(
            x, skip, other, moved, start, lines, channels, mask, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, KEEP
        )
        if KEEP:
            tl.store(joined + places, values, mask=mask)
        wide = values.to(tl.float32)
        means = tl.sum(tl.where(member, tl.sum(wide, axis=0)[None, :], 0.0), axis=1) / number
        wide = tl.where(mask, wide - of_channels(means, member)[None, :], 0.0)
        variances = tl.sum(tl.where(member, tl.sum(wide * wide, axis=0)[None, :], 0.0), axis=1) / number
        scale *= of_channels(tl.rsqrt(variances + EPS), member)
        y = finished(wide, scale, offset, SILU)
        tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)
    else:
        each, deviation = channel_sums(
            x, skip, other, joined, moved, start, rows, channels, inside, FIRST, CHANNELS, BLOCK_ROWS, 0, HAS_SKIP,
            HAS_OTHER, KEEP,
        )  # fmt: skip
        means, squares = group_sums(each, deviation, rows, member, WIDTH)
        mean = of_channels(means, member)
        scale *= of_channels(tl.rsqrt(squares / number + EPS), member)
        # a loop: written out, the tiles' addresses fill the registers
        begin = tl.zeros((), dtype=tl.int32)
        while begin < rows:
            here = begin + lines
            mask = (here < rows)[:, None] & inside[None, :]
            places = start * CHANNELS + here[:, None] * CHANNELS + channels[None, :]
            if KEEP:  # the program itself wrote it, before a barrier
                values = tl.load(joined + places, mask=mask, other=0.0).to(tl.float32)
            else:
                values = joined_tile(
                    x, skip, other, moved, start, here, channels, mask, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, KEEP
                )
            y = finished(values - mean[None, :], scale, offset, SILU)
            tl.store(out + places, y.to(out.dtype.element_ty), mask=mask)
            begin += BLOCK_ROWS
