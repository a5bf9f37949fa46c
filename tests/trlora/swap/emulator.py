"""The swap kernel in NumPy: its arguments read back, lane by lane as the PTX ISA lays fragments out, and its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trlora.swap.launch import tiles_of
from trlora.swap.packed import Packed
from trlora.swap.variant import Variant

Array = np.ndarray


def emulate(
    variant: Variant, weights: Sequence[Tensor], packed: Sequence[Packed], strengths: Sequence[float]
) -> list[Tensor]:
    """What the kernel writes for each weight; what it does not write is NaN."""
    outs = [torch.full_like(weight, float("nan")) for weight in weights]
    for layer, first, rows, offset in tiles_of(variant, [weight.shape[0] for weight in weights]):
        number, piece = divmod(layer, variant.pieces)
        start = piece * variant.width
        columns = slice(start, start + variant.width)
        for row in range(first, first + rows):
            x = _wide(weights[number].flatten(1)[row, columns]).reshape(variant.n_hi, variant.n_lo)
            pairs = zip(packed, strengths, strict=True)
            sums = [_change(variant, a, part, number, layer, offset + row, x, s) for a, (part, s) in enumerate(pairs)]
            outs[number].flatten(1)[row, columns] = torch.from_numpy(x + sum(sums)).flatten().to(outs[number].dtype)
    return outs


def _change(
    variant: Variant, adapter: int, part: Packed, number: int, layer: int, row: int, x: Array, s: float
) -> Array:
    """Of one adapter, (n_hi, n_lo). A part of the kernel is a matrix of n_lo rows and n_hi columns, hence the transposes."""
    half = torch.bfloat16 if variant.bfloat16 else torch.float16
    high = variant.n_hi
    total = np.zeros((variant.n_lo, high), np.float32)
    if variant.terms[adapter]:
        slow = s * columns_of_8(_wide(part.q[number]))
        for term in range(variant.terms[adapter]):
            z = rows_of_16(_wide(part.p[number, term])) @ x.T
            total += _rounded(z, half) @ _rounded(slow[term, :high, :high], half)
        total += x.T @ _rounded(slow[-1, :high, :high], half)
    if variant.ring_pairs[adapter]:
        left = _wide(part.left[row])  # (a, b)
        fast = np.concatenate([rows_of_8(_wide(tile)) for tile in part.right[number]], 1)  # (middle, n_lo, b)
        slow = s * columns_of_8(_wide(part.last[number])[:, None])  # (pairs, 2·a, n_hi)
        for pair in range(variant.ring_pairs[adapter]):
            u = np.concatenate([_rounded(fast[2 * pair + c] @ left.T, half) for c in range(2)], 1)
            total += u @ _rounded(slow[pair, :, :high], half)
    if variant.low_rank_steps[adapter]:
        right = columns_of_8(_wide(part.right[layer]).swapaxes(0, 1))  # (rank, width)
        total += _rounded(s * (_wide(part.left[row]) @ right).reshape(high, variant.n_lo).T, half)
    return total.T


def rows_of_16(fragments: Array) -> Array:
    """`(*batch, M/16, K/16, 32, 8)` → `(*batch, M, K)`: the first factor of m16n8k16."""
    *batch, high, wide, _, _ = fragments.shape
    result = np.full((*batch, 16 * high, 16 * wide), np.nan, fragments.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
            result[..., row::16, column::16] = fragments[..., lane, i]
    return result


def rows_of_8(fragments: Array) -> Array:
    """`(*batch, 32, 4)` → `(*batch, 16, 8)`: the first factor of m16n8k8."""
    result = np.full((*fragments.shape[:-2], 16, 8), np.nan, fragments.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            result[..., group if i < 2 else group + 8, thread * 2 + (i & 1)] = fragments[..., lane, i]
    return result


def columns_of_8(fragments: Array) -> Array:
    """`(*batch, K/16, N/8, 32, 4)` → `(*batch, K, N)`: the second factor of m16n8k16."""
    *batch, high, wide, _, _ = fragments.shape
    result = np.full((*batch, 16 * high, 8 * wide), np.nan, fragments.dtype)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(4):
            row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
            result[..., row::16, group::8] = fragments[..., lane, i]
    return result


def _wide(tensor: Tensor) -> Array:
    return tensor.float().numpy()


def _rounded(x: Array, half: torch.dtype) -> Array:
    return torch.from_numpy(np.ascontiguousarray(x)).to(half).float().numpy()
