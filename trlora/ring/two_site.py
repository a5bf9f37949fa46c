"""A tensor-ring matrix as a sum of few Kronecker products, and a weight times it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trlora.ring.contract import open_chain
from trlora.ring.multiply import best_cut
from trlora.ring.shapes import check_matrix_ring

_BYTES = {"cpu": 5 * 2**20}
"""Between the two products of the rows that are multiplied at a time: they stay in a CPU's cache."""
_OTHER_BYTES = 256 * 2**20
"""The same on other devices, where it is memory that a merge takes for a moment."""
_FEWEST = ("cpu",)
"""Devices on which a transform is brought to its fewest terms first. Elsewhere the decomposition waits for the host at every
layer, which no CUDA graph holds."""
_GRAM = 1e-8
"""Singular values that the eigenvalues of Gram matrices in float64 tell from zero, relative to the greatest."""


@final
@dataclass(frozen=True)
class TwoSites:
    """`T − I = Σ_q Q_q ⊗ P_q + F ⊗ I`, the fast part of the index being that of P (little-endian modes)."""

    fast: Tensor
    """P, (terms, n_lo, n_lo), float64, each without its part along the identity."""
    slow: Tensor
    """Q, (terms, n_hi, n_hi)."""
    fixed: Tensor
    """F, (n_hi, n_hi)."""


def two_sites(cores: Sequence[Tensor], cut: int, precision: float = 2.0**-24) -> TwoSites:
    """A square tensor-ring matrix cut behind its core number `cut`, in as few terms as it has (its operator Schmidt rank).

    The cut has R_1·R_{cut+1} terms. A ring that was trained from its start (`identity_cores`) has one, since its slices
    stay about equal; work that goes by terms falls in proportion.

    Args:
        cores: D tensors `(I_d, I_d, R_d, R_{d+1})`, `R_{D+1} = R_1`.
        cut: from 1 to D; with D nothing is slow.
        precision: terms are left out while together they are below this part of the identity's norm; none is where it is
            below 1e-8. The default is the rounding of float32.

    Raises:
        ShapeError: the cores are no ring.
    """
    check_matrix_ring(cores)
    wide = [core.detach().double() for core in cores]
    fast = open_chain(wide[:cut])  # (lo, lo, a, b)
    if cut == len(wide):
        fast = fast.diagonal(dim1=2, dim2=3).sum(-1)[None]
        slow = fast.new_ones(1, 1, 1)
    else:
        fast = fast.permute(2, 3, 0, 1).flatten(0, 1)
        slow = open_chain(wide[cut:]).permute(3, 2, 0, 1).flatten(0, 1)  # from (hi, hi, b, a)
    return of_terms(fast, slow, precision)


def of_terms(fast: Tensor, slow: Tensor, precision: float = 2.0**-24) -> TwoSites:
    """The same from `T = Σ_q slow_q ⊗ fast_q`.

    Args:
        fast: (terms, n_lo, n_lo), float64.
        slow: (terms, n_hi, n_hi), float64.
    """
    share = fast.diagonal(dim1=1, dim2=2).mean(1)  # of the identity
    fixed = (share[:, None, None] * slow).sum(0) - _eye(slow)
    fast = fast - share[:, None, None] * _eye(fast)
    if precision >= _GRAM:
        fast, slow = _fewest(fast, slow, precision * (fast.shape[1] * slow.shape[1]) ** 0.5)
    return TwoSites(fast, slow, fixed)


def change_by_cores(weight: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """`weight @ (T − I)` for the square tensor-ring matrix T of `cores`; not to be differentiated.

    Args:
        weight: `(rows, ∏ I_d)`, float32 or float64.
        cores: D tensors `(I_d, I_d, R_d, R_{d+1})`, `R_{D+1} = R_1`.

    Returns:
        A new tensor of the weight's shape and dtype.

    Raises:
        ShapeError: the cores are no ring, or the weight has another number of columns.
    """
    cut = best_cut(cores, weight.shape[-1])
    device = weight.device.type
    sites = two_sites(cores, cut, torch.finfo(weight.dtype).eps / 2 if device in _FEWEST else 0.0)
    terms, n_lo, _ = sites.fast.shape
    n_hi = len(sites.fixed)
    left = sites.fast.permute(1, 0, 2).reshape(n_lo, terms * n_lo).to(weight)
    right = sites.slow.permute(2, 1, 0).reshape(n_hi, n_hi * terms).to(weight)
    fixed = sites.fixed.T.to(weight)
    result = weight.new_empty(len(weight), n_hi, n_lo)
    between = len(weight) * max(1, terms) * n_hi * n_lo * weight.element_size()
    pieces = max(1, -(-between // _BYTES.get(device, _OTHER_BYTES)))
    room = weight.new_empty(-(-len(weight) // pieces) * n_hi, terms * n_lo)
    for rows, out in zip(weight.tensor_split(pieces), result.tensor_split(pieces), strict=True):
        count = len(rows)
        torch.bmm(fixed.expand(count, -1, -1), rows.reshape(count, n_hi, n_lo), out=out)
        if terms:
            met = torch.mm(rows.reshape(count * n_hi, n_lo), left, out=room[: count * n_hi])
            out.baddbmm_(right.expand(count, -1, -1), met.view(count, n_hi * terms, n_lo))
    return result.flatten(1)


def _fewest(fast: Tensor, slow: Tensor, dropped: float) -> tuple[Tensor, Tensor]:
    """The same sum of Kronecker products in the fewest terms: a singular value decomposition, from Gram matrices of the size
    of the terms."""
    sizes, turn = torch.linalg.eigh(_gram(slow))
    kept = sizes > 1e-15 * sizes.max()
    root, turn = sizes[kept].sqrt(), turn[:, kept]
    slow = torch.tensordot(turn.T / root[:, None], slow, 1)  # orthonormal
    fast = torch.tensordot(turn.T * root[:, None], fast, 1)
    sizes, turn = torch.linalg.eigh(_gram(fast))
    sizes, turn = sizes.clamp(min=0).flip(0), turn.flip(1)
    tail = sizes.flip(0).cumsum(0).flip(0).sqrt()  # of each term and those behind it
    terms = int((tail > max(dropped, _GRAM * float(tail[0]))).sum()) if len(tail) else 0
    turn = turn[:, :terms].T
    return torch.tensordot(turn, fast, 1), torch.tensordot(turn, slow, 1)


def _gram(terms: Tensor) -> Tensor:
    flat = terms.flatten(1)
    return flat @ flat.T


def _eye(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
