"""Where training starts: the identity for a transform, zero for a residual."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def identity_cores(
    modes: Sequence[int],
    ranks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Cores of the identity: `A^d[:, :, r, r'] = I / R` for all r, r'.

    With ranks that differ, the block is `I / √(R_d·R_{d+1})`: the trace over the ring still sums to one. Where every
    `√(R_d·R_{d+1})` is a power of two the products are exact in floating point, so the start equals the identity to the
    last bit; otherwise it does to rounding.

    All R_d×R_{d+1} slices of a core start equal, so they have equal gradients and stay equal: trained from here, a ring of
    any rank is a Kronecker product of D matrices, as with rank 1. The paper does not say so; it follows from the formula.

    Args:
        modes: `(I_1, …, I_D)`.
        ranks: `(R_1, …, R_D)`.

    Returns:
        D tensors `(I_d, I_d, R_d, R_{d+1})`.

    Source: arXiv 2501.08727, Proposition 1.
    """
    cores = []
    for d, mode in enumerate(modes):
        rank, following = ranks[d], ranks[(d + 1) % len(ranks)]
        eye = torch.eye(mode, dtype=torch.float64) / math.sqrt(rank * following)
        cores.append(
            eye[:, :, None, None].expand(mode, mode, rank, following).to(device, dtype, copy=True).contiguous()
        )
    return cores


def residual_cores(
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    ranks: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """The zero start of a tensor-ring residual: `B^1 = 0`, every other core `N(0, σ²)`, `σ = √n_out / n_in`.

    For a core `(I_d, R_d, R_{d+1})`, `n_out = R_{d+1}` and `n_in = I_d·R_d`.

    Args:
        row_modes: `(I_1, …, I_D)` over the output dimension.
        column_modes: `(J_1, …, J_E)` over the input dimension.
        ranks: the D + E ranks of the ring, row cores first.
        generator: source of the random numbers, on the CPU whatever the device, so that a seed means the same everywhere.

    Returns:
        D row cores `(I_d, R_d, R_{d+1})` and E column cores `(J_d, R_d, R_{d+1})`.

    Source: arXiv 2501.08727, initialisation.
    """
    cores = []
    for d, mode in enumerate([*row_modes, *column_modes]):
        rank, following = ranks[d], ranks[(d + 1) % len(ranks)]
        deviation = math.sqrt(following) / (mode * rank) if d else 0.0
        core = torch.randn(mode, rank, following, generator=generator, dtype=torch.float32) * deviation
        cores.append(core.to(device, dtype))
    return cores[: len(row_modes)], cores[len(row_modes) :]
