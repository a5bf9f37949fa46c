"""A layer's adapter in the form that the swap kernel takes: a transform of two sites, a residual of three.

A row of W0 is seen as a matrix X of n_hi × n_lo (little-endian modes: n_lo is the fast part of the index). Then

    W0·(T − I)  is  X ↦ Σ_q Q_qᵀ·X·P_q + Fᵀ·X,      T − I = Σ_q Q_q ⊗ P_q + F ⊗ I,

and the residual of a ring is `Δ[o, (hi, lo)] = Σ_{a,b,c} L[o][a, b]·C[lo][b, c]·E[hi][c, a]`. Everything is
computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import final

import torch
from torch import Tensor

from trlora import ring
from trlora.residuals import AbstractResidual, TensorRingResidual
from trlora.transforms import AbstractTransform, TensorRingTransform

_DROPPED = 2.0**-24
"""Terms are left out while together they are below this part of T: the rounding of float32."""


@final
@dataclass(frozen=True)
class TwoSites:
    """`T − I = Σ_q Q_q ⊗ P_q + F ⊗ I`."""

    fast: Tensor
    """P, (terms, n_lo, n_lo), float64, each without its part along the identity, of greatest entry between 1 and 2."""
    slow: Tensor
    """Q, (terms, n_hi, n_hi)."""
    fixed: Tensor
    """F, (n_hi, n_hi)."""


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


def two_sites(transform: AbstractTransform, n_lo: int) -> TwoSites:
    """A transform cut at `n_lo`, with as few terms as it has (its operator Schmidt rank).

    The cut of a ring gives R_1·R_k terms. A ring that was trained from its start (`trlora.ring.identity_cores`) has one: a
    singular value decomposition finds it, and the kernel's work falls in proportion.

    Args:
        n_lo: one of `splits_of(transform)`.
    """
    if isinstance(transform, TensorRingTransform):
        cores = [core.detach().double() for core in transform.core]
        at = splits_of(transform).index(n_lo) + 1
        fast, slow = _terms(cores[:at], cores[at:])
    else:
        fast = transform.matrix().detach().double()[None]
        slow = fast.new_ones(1, 1, 1)
    share = fast.diagonal(dim1=1, dim2=2).mean(1)  # of the identity
    fixed = (share[:, None, None] * slow).sum(0) - _eye(slow)
    fast = fast - share[:, None, None] * _eye(fast)
    return TwoSites(*_fewest(fast, slow, transform.features), fixed)


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


def _terms(fast_cores: Sequence[Tensor], slow_cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    fast = ring.open_chain(fast_cores)  # (lo, lo, a, b)
    if not slow_cores:
        closed = fast.diagonal(dim1=2, dim2=3).sum(-1)[None]
        return closed, closed.new_ones(1, 1, 1)
    slow = ring.open_chain(slow_cores)  # (hi, hi, b, a)
    return fast.permute(2, 3, 0, 1).flatten(0, 1), slow.permute(3, 2, 0, 1).flatten(0, 1)


def _fewest(fast: Tensor, slow: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """The same sum of Kronecker products in the fewest terms."""
    first, first_rest = torch.linalg.qr(fast.flatten(1).T)
    second, second_rest = torch.linalg.qr(slow.flatten(1).T)
    u, sizes, vh = torch.linalg.svd(first_rest @ second_rest.T)
    # T is near the identity, whose Frobenius norm is √features
    tail = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    terms = int((tail > _DROPPED * features**0.5).sum())
    fast = (first @ (u[:, :terms] * sizes[:terms])).T.reshape(terms, *fast.shape[1:])
    slow = (second @ vh[:terms].T).T.reshape(terms, *slow.shape[1:])
    for term in range(terms):
        scale = power_of_two(fast[term])
        fast[term] *= scale
        slow[term] /= scale
    return fast, slow


def _eye(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
