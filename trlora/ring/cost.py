"""Parameters and floating-point operations, counted from modes and ranks; a multiply-add counts as two."""

from __future__ import annotations

import math
from collections.abc import Sequence


def matrix_ring_parameters(row_modes: Sequence[int], column_modes: Sequence[int], ranks: Sequence[int]) -> int:
    """Parameters of a tensor-ring matrix: `Σ_d I_d·J_d·R_d·R_{d+1}`."""
    closed = [*ranks, ranks[0]]
    pairs = zip(row_modes, column_modes, strict=True)
    return sum(i * j * closed[d] * closed[d + 1] for d, (i, j) in enumerate(pairs))


def ring_parameters(modes: Sequence[int], ranks: Sequence[int]) -> int:
    """Parameters of a tensor ring (row cores, then column cores): `Σ_d I_d·R_d·R_{d+1}`."""
    closed = [*ranks, ranks[0]]
    return sum(mode * closed[d] * closed[d + 1] for d, mode in enumerate(modes))


def matrix_from_cores_flops(row_modes: Sequence[int], column_modes: Sequence[int], ranks: Sequence[int]) -> int:
    """Operations of `matrix_from_cores`: each step extends the chain by one core, the last one closes the ring."""
    closed = [*ranks, ranks[0]]
    order = len(row_modes)
    if order == 1:
        return row_modes[0] * column_modes[0] * (ranks[0] - 1)
    total, entries = 0, row_modes[0] * column_modes[0]
    for d in range(1, order):
        entries *= row_modes[d] * column_modes[d]
        ends = 1 if d == order - 1 else ranks[0] * closed[d + 1]
        inner = closed[d] * (ranks[0] if d == order - 1 else 1)
        total += 2 * entries * ends * inner
    return total


def apply_cores_flops(row_modes: Sequence[int], column_modes: Sequence[int], ranks: Sequence[int], tokens: int) -> int:
    """Operations of `apply_cores` on `tokens` vectors."""
    closed = [*ranks, ranks[0]]
    order = len(row_modes)
    if order == 1:
        return tokens * 2 * row_modes[0] * column_modes[0] + row_modes[0] * column_modes[0] * (ranks[0] - 1)
    total, done = 0, 1
    for d in range(order):
        untouched = math.prod(column_modes[d + 1 :])
        # the first step opens the ring (start and end rank appear), the last one closes it (both are summed)
        entries = untouched * row_modes[d] * done * (1 if d == order - 1 else ranks[0] * closed[d + 1])
        inner = column_modes[d] * (1 if d == 0 else closed[d] * (ranks[0] if d == order - 1 else 1))
        total += 2 * tokens * entries * inner
        done *= row_modes[d]
    return total


def low_rank_flops(rows: int, columns: int, rank: int, tokens: int) -> int:
    """Operations of `(x·R)·Lᵀ` on `tokens` vectors."""
    return 2 * tokens * rank * (rows + columns)
