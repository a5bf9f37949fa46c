"""An adapter's factors for the layers of one launch, as the kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trlora.ring import TwoSites
from trlora.swap.fragments import columns_of_8, padded, rows_of_8, rows_of_16
from trlora.swap.two_site import RingSites, power_of_two
from trlora.swap.variant import Variant


@final
@dataclass(frozen=True)
class Factors:
    """One layer's of one adapter, float64; a part that changes nothing is None."""

    transform: TwoSites | None = None
    ring: RingSites | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    """L (out, r) and R (in, r)."""


@final
@dataclass(frozen=True)
class Packed:
    """The kernel's arguments of one adapter. Empty where the variant has no such part."""

    p: Tensor
    """(layers, terms, n_lo/16, n_lo/16, 32, 8)."""
    q: Tensor
    """(layers, terms + 1, slow_rows/16, slow_columns/8, 32, 4), float32: the strength is multiplied in the kernel."""
    left: Tensor
    """Of a ring (rows, 8, 8), of a low rank (rows, 16·steps); each layer's rows begin at a multiple of 16."""
    right: Tensor
    """Of a ring (layers, n_lo/16, 2·pairs, 32, 4), of a low rank (layers·pieces, width/8, steps, 32, 4)."""
    last: Tensor
    """Of a ring (layers, pairs, slow_columns/8, 32, 4), float32."""

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.p, self.q, self.left, self.right, self.last))


def row_offsets(rows: Sequence[int]) -> tuple[list[int], int]:
    """Where each layer's rows begin in L, and how many rows it has in all."""
    offsets, total = [], 0
    for count in rows:
        offsets.append(total)
        total += (count + 15) // 16 * 16
    return offsets, total + 16  # a block of 8 rows reads 16


def pack(
    variant: Variant, adapter: int, rows: Sequence[int], layers: Sequence[Factors], device: torch.device
) -> Packed:
    """Lay out the factors of an adapter, and bring them to a device.

    Args:
        adapter: its number among those that the variant is for.
        rows: of each layer's weight.
        layers: one a layer, in the same order; their ranks are at most the variant's.
    """
    half = torch.bfloat16 if variant.bfloat16 else torch.float16
    offsets, total = row_offsets(rows)
    empty = torch.empty(0)
    p, q, left, right, last = empty, empty, empty, empty, empty
    if variant.terms[adapter]:
        p, q = _transforms(variant, variant.terms[adapter], layers, half)
    if any(variant.ring_pairs):
        left, right, last = _rings(variant, variant.ring_pairs[adapter], layers, offsets, total, half)
    elif any(variant.low_rank_steps):
        left, right = _low_ranks(variant, variant.low_rank_steps[adapter], layers, offsets, total, half)
    return Packed(*(tensor.to(device) for tensor in (p, q, left, right, last)))


def _transforms(variant: Variant, terms: int, layers: Sequence[Factors], half: torch.dtype) -> tuple[Tensor, Tensor]:
    lo, high = variant.n_lo, (variant.slow_rows, variant.slow_columns)
    fast = torch.zeros(len(layers), terms, lo, lo)
    slow = torch.zeros(len(layers), terms + 1, *high)
    for number, layer in enumerate(layers):
        if layer.transform is not None:
            fast[number, : len(layer.transform.fast)] = layer.transform.fast
            slow[number, : len(layer.transform.slow)] = padded(layer.transform.slow, *high)
            slow[number, -1] = padded(layer.transform.fixed, *high)
    return rows_of_16(fast.to(half)), columns_of_8(slow)


def _rings(
    variant: Variant, pairs: int, layers: Sequence[Factors], offsets: list[int], total: int, half: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    middle = 2 * pairs
    left = torch.zeros(total, 8, 8)
    fast = torch.zeros(len(layers), variant.n_lo, 8, middle)
    slow = torch.zeros(len(layers), middle, 8, variant.slow_columns)
    for number, layer in enumerate(layers):
        if layer.ring is not None:
            first, second = power_of_two(layer.ring.left), power_of_two(layer.ring.fast)
            rows = layer.ring.left.shape[0]
            left[offsets[number] : offsets[number] + rows] = padded(layer.ring.left * first, 8, 8)
            fast[number] = padded(layer.ring.fast * second, 8, middle)
            slow[number] = padded(layer.ring.slow.permute(1, 2, 0) / (first * second), middle, 8, variant.slow_columns)
    right = rows_of_8(fast.to(half).movedim(3, 1)).transpose(1, 2).contiguous()  # (layers, n_lo/16, middle, 32, 4)
    last = columns_of_8(slow.unflatten(1, (pairs, 2)).flatten(2, 3)).squeeze(2)
    return left.to(half), right, last


def _low_ranks(
    variant: Variant, steps: int, layers: Sequence[Factors], offsets: list[int], total: int, half: torch.dtype
) -> tuple[Tensor, Tensor]:
    rank = 16 * steps
    left = torch.zeros(total, rank)
    right = torch.zeros(len(layers), rank, variant.stride)
    for number, layer in enumerate(layers):
        if layer.low_rank is not None:
            rows, columns = layer.low_rank
            scale = power_of_two(columns)
            left[offsets[number] : offsets[number] + len(rows)] = padded(rows / scale, rank)
            right[number] = padded((columns * scale).T, rank, variant.stride)
    pieces = right.unflatten(2, (variant.pieces, variant.width)).transpose(1, 2).flatten(0, 1)
    return left.to(half), columns_of_8(pieces.to(half)).transpose(1, 2).contiguous()
