# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton is not installed on machines without a GPU)
"""What the group normalisations' kernels have in common: a tile of rows and channels, read, reduced to groups, finished."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def members(BLOCK_GROUPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """(groups, channels) of a tile: whether the channel is of the group."""
    return tl.arange(0, BLOCK_GROUPS)[:, None] == (tl.arange(0, BLOCK_CHANNELS) // WIDTH)[None, :]


@triton.jit
def moved_by(shift, sample, stride, channels, inside, FIRST: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """What is added to each channel, float32."""
    moved = tl.zeros([channels.shape[0]], dtype=tl.float32)
    if HAS_SHIFT:
        here = inside & (channels < FIRST)
        moved = tl.load(shift + sample * stride + channels, mask=here, other=0.0).to(tl.float32)
    return moved


@triton.jit
def joined_tile(
    x,
    skip,
    other,
    moved,
    start,
    lines,
    channels,
    mask,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    KEEP: tl.constexpr,
):
    """(rows, channels) of `x + skip + moved`, behind FIRST channels `other`, float32; rounded as it is kept where it is.

    `start` is the sample's first row, `lines` are rows of it, `moved` is of the channels.
    """
    own = mask & (channels < FIRST)[None, :] if HAS_OTHER else mask
    places = start * FIRST + lines[:, None] * FIRST + channels[None, :]
    values = tl.load(x + places, mask=own, other=0.0).to(tl.float32)
    if HAS_SKIP:
        values += tl.load(skip + places, mask=own, other=0.0).to(tl.float32)
    values = tl.where(own, values + moved[None, :], 0.0)
    if HAS_OTHER:
        rest = mask & (channels >= FIRST)[None, :]
        places = start * (CHANNELS - FIRST) + lines[:, None] * (CHANNELS - FIRST) + (channels - FIRST)[None, :]
        values += tl.load(other + places, mask=rest, other=0.0).to(tl.float32)
    return values.to(x.dtype.element_ty) if KEEP else values


@triton.jit
def finished(values, scale, bias, SILU: tl.constexpr):
    """(rows, channels) of centred values → the output's."""
    y = values * scale[None, :] + bias[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def added_tile(
    sums,
    squares,
    pivot,
    x,
    skip,
    other,
    joined,
    moved,
    start,
    lines,
    count,
    channels,
    inside,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    KEEP: tl.constexpr,
):
    """`sums` and `squares` with those of one tile less `pivot`; lines from `count` on are not there. KEEP: the tile is
    written to `joined`."""
    mask = (lines < count)[:, None] & inside[None, :]
    values = joined_tile(
        x, skip, other, moved, start, lines, channels, mask, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, KEEP
    )
    if KEEP:
        places = start * CHANNELS + lines[:, None] * CHANNELS + channels[None, :]
        tl.store(joined + places, values, mask=mask)
    wide = tl.where(mask, values.to(tl.float32) - pivot[None, :], 0.0)
    return sums + wide, squares + wide * wide


@triton.jit
def channel_sums(
    x,
    skip,
    other,
    joined,
    moved,
    start,
    count,
    channels,
    inside,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Of `count` rows from `start` on: each channel's mean and sum of squared deviations. TILES tiles hold them; 0 where
    their number is not known at the build.

    Sums are less the first row, so that a mean far from zero cancels nothing.
    """
    zero = tl.arange(0, 1)
    mask = (zero < count)[:, None] & inside[None, :]
    pivot = joined_tile(x, skip, other, moved, start, zero, channels, mask, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, KEEP)
    pivot = tl.sum(pivot.to(tl.float32), axis=0)
    sums = tl.zeros([BLOCK_ROWS, channels.shape[0]], dtype=tl.float32)
    squares = tl.zeros([BLOCK_ROWS, channels.shape[0]], dtype=tl.float32)
    lines = tl.arange(0, BLOCK_ROWS)
    if TILES > 0:
        for tile in tl.static_range(TILES):
            sums, squares = added_tile(
                sums, squares, pivot, x, skip, other, joined, moved, start, tile * BLOCK_ROWS + lines, count, channels,
                inside, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, KEEP,
            )  # fmt: skip
    else:
        begin = tl.zeros((), dtype=tl.int32)
        while begin < count:
            sums, squares = added_tile(
                sums, squares, pivot, x, skip, other, joined, moved, start, begin + lines, count, channels,
                inside, FIRST, CHANNELS, HAS_SKIP, HAS_OTHER, KEEP,
            )  # fmt: skip
            begin += BLOCK_ROWS
    number = tl.maximum(count, 1).to(tl.float32)
    total = tl.sum(sums, axis=0)
    deviation = tl.maximum(tl.sum(squares, axis=0) - total * total / number, 0.0)
    return pivot + total / number, deviation


@triton.jit
def group_sums(mean, deviation, count, member, WIDTH: tl.constexpr):
    """Each group's mean and sum of squared deviations, from its channels' of `count` rows each."""
    means = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1) / WIDTH
    between = tl.where(member, mean[None, :] - means[:, None], 0.0)
    return means, tl.sum(tl.where(member, deviation[None, :], 0.0) + count * between * between, axis=1)


@triton.jit
def of_channels(values, member):
    """A value of each group, for each of its channels."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)
