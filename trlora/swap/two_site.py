"""A layer's adapter in the form that the swap kernel takes: a transform of two sites, a residual of three.

A row of W0 is seen as a matrix X of n_hi × n_lo (little-endian modes: n_lo is the fast part of the index). Then

    W0·(T − I)  is  X ↦ Σ_q Q_qᵀ·X·P_q + Fᵀ·X,      T − I = Σ_q Q_q ⊗ P_q + F ⊗ I,

and the residual of a ring is `Δ[o, (hi, lo)] = Σ_{a,b,c} L[o][a, b]·C[lo][b, c]·E[hi][c, a]`. Everything is
computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import final

import torch
from torch import Tensor

from trlora import ring
from trlora.residuals import AbstractResidual, TensorRingResidual
from trlora.transforms import AbstractTransform, TensorRingTransform


@final
@dataclass(frozen=True)
class RingSites:
    """`Δ[o, (hi, lo)] = Σ L[o][a, b]·C[lo][b, c]·E[hi][c, a]`."""

    left: Tensor
    """L, (out, a, b), float64."""
    fast: Tensor
    """C, (n_lo, b, c)."""
    slow: Tensor
    """E, (n_hi, c, a)."""


def splits_of(transform: AbstractTransform) -> list[int]:
    """The n_lo where a transform can be cut in two: after each of a ring's cores; of another one only behind the whole."""
    if not isinstance(transform, TensorRingTransform):
        return [transform.features]
    return list(accumulate((int(core.shape[0]) for core in transform.core), mul))


def two_sites(transform: AbstractTransform, n_lo: int) -> ring.TwoSites:
    """A transform cut at `n_lo`, its fast factors with greatest entries between 1 and 2.

    Args:
        n_lo: one of `splits_of(transform)`.
    """
    if isinstance(transform, TensorRingTransform):
        sites = ring.two_sites(list(transform.core), splits_of(transform).index(n_lo) + 1)
    else:
        matrix = transform.matrix().detach().double()
        sites = ring.of_terms(matrix[None], matrix.new_ones(1, 1, 1))
    scales = [power_of_two(term) for term in sites.fast]
    scale = torch.stack(scales)[:, None, None] if scales else sites.fast.new_ones(0, 1, 1)
    return ring.TwoSites(sites.fast * scale, sites.slow / scale, sites.fixed)


def ring_sites(residual: AbstractResidual, n_lo: int) -> RingSites | None:
    """A tensor ring's three sites, its columns cut at `n_lo`; None where the residual is none, or has no such cut."""
    if not isinstance(residual, TensorRingResidual):
        return None
    columns = [core.detach().double() for core in residual.column_core]
    sizes = list(accumulate((int(core.shape[0]) for core in columns), mul))
    if n_lo not in sizes:
        return None
    at = sizes.index(n_lo) + 1
    left = ring.chain_from_cores([core.detach().double() for core in residual.row_core])
    fast = ring.chain_from_cores(columns[:at])
    if at < len(columns):
        return RingSites(left, fast, ring.chain_from_cores(columns[at:]))
    return RingSites(left, fast, torch.eye(left.shape[1], dtype=fast.dtype, device=fast.device)[None])


def power_of_two(tensor: Tensor) -> Tensor:
    """The power of two, a scalar, that brings the greatest absolute entry between 1 and 2; 1 for zeros."""
    most = tensor.abs().max()
    return torch.where(most > 0, torch.exp2(-torch.floor(torch.log2(most))), torch.ones_like(most))
