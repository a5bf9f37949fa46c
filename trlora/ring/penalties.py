"""Penalties that hold a tensor-ring matrix near the identity or near the orthogonal matrices, from the cores alone.

Neither forms T. Both are sums of Frobenius norms (not squares), so they are not smooth where they vanish; there the
gradient returned is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trlora.errors import ShapeError
from trlora.ring.product import product_cores
from trlora.ring.shapes import check_matrix_ring


def identity_penalty(cores: Sequence[Tensor]) -> Tensor:
    """`R_I = Σ_d Σ_{r,r'} ‖A^d[:, :, r, r'] − I/R‖_F`, a scalar; zero exactly at the start of Proposition 1.

    Args:
        cores: D tensors `(I_d, I_d, R_d, R_{d+1})`. Where ranks differ, R is `√(R_d·R_{d+1})`, as at the start.

    Raises:
        ShapeError: the cores are no ring, or not square.

    Source: arXiv 2501.08727, identity regularisation.
    """
    _check_square(cores)
    return _distance(cores, [1 / math.sqrt(core.shape[2] * core.shape[3]) for core in cores])


def orthogonal_penalty(cores: Sequence[Tensor]) -> Tensor:
    """How far the cores of `T·Tᵀ` are from those of the identity, a scalar.

    By Proposition 2, `T·Tᵀ` is a ring of ranks `R²` with cores `C^d[i, j] = Σ_l A^d[i, l] ⊗ A^d[j, l]`. By Proposition 1
    the identity, as a ring of ranks `R²`, has cores `I/R²` in *each* of its `R²×R²` blocks. So

        `R_O = Σ_d Σ_{r,r'} ‖C^d[:, :, r, r'] − I/R²‖_F`  over r, r' = 1 … R².

    It is zero at the start, and at every Kronecker product of orthogonal matrices `O_D ⊗ ··· ⊗ O_1` written as
    `A^d = O_d / R`. It is a sufficient condition: a zero means `T·Tᵀ = I`; an orthogonal T whose cores use the ring's
    freedom of gauge can have a penalty above zero.

    The paper writes the target as `I_{R²}/R`, see `literal_orthogonal_penalty` for why the two differ.

    Raises:
        ShapeError: the cores are no ring, or not square.
    """
    _check_square(cores)
    gram = product_cores(cores, cores)
    return _distance(gram, [1 / math.sqrt(core.shape[2] * core.shape[3]) for core in gram])


def literal_orthogonal_penalty(cores: Sequence[Tensor]) -> Tensor:
    """The formula as the paper prints it: `C^d[i_d, i_d]` is asked to be `I_{R²}/R`, the identity of size R² over R.

    A ring with those cores is `tr((I_{R²}/R)^D)·I = R^{2−D}·I`: the identity only for D = 2 or R = 1. For the usual
    D = 3, R = 2 its zero is `T·Tᵀ = I/2`, and it is not zero at the paper's own start (Proposition 1). Offered to
    repeat the paper; train with `orthogonal_penalty`.

    Raises:
        ShapeError: the cores are no ring, not square, or of ranks that differ (the formula needs one R).
    """
    ranks = {rank for core in cores for rank in core.shape[2:]}
    if len(ranks) > 1:
        raise ShapeError(f"the literal penalty needs one rank, found {sorted(ranks)}; use orthogonal_penalty")
    _check_square(cores)
    gram = product_cores(cores, cores)
    rank = cores[0].shape[2]
    eye = torch.eye(rank * rank, dtype=gram[0].dtype, device=gram[0].device) / rank
    return _distance(gram, [eye] * len(gram))


def _distance(cores: Sequence[Tensor], targets: Sequence[float | Tensor]) -> Tensor:
    """`Σ_d Σ_{r,r'} ‖A^d[:, :, r, r'] − t_d[r, r']·I‖_F`; a float target is the same for all r, r'."""
    total = cores[0].new_zeros(())
    for core, target in zip(cores, targets, strict=True):
        eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
        off = core - eye[:, :, None, None] * target
        total = total + torch.linalg.vector_norm(off, dim=(0, 1)).sum()
    return total


def _check_square(cores: Sequence[Tensor]) -> None:
    check_matrix_ring(cores)
    for d, core in enumerate(cores):
        if core.shape[0] != core.shape[1]:
            raise ShapeError(f"core {d} has modes {core.shape[0]} and {core.shape[1]}, expected a square core")
