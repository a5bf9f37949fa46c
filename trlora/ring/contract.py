"""From cores to dense matrices.

Index order is little-endian throughout: mode 1 runs fastest, `i = i_1 + i_2·n_1 + i_3·n_1·n_2 + …`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trlora.ring.shapes import check_matrix_ring, check_ring


def matrix_from_cores(cores: Sequence[Tensor]) -> Tensor:
    """The dense matrix of a tensor-ring matrix (TRM), `T[i, j] = tr(A^1[i_1, j_1] ··· A^D[i_D, j_D])`.

    Args:
        cores: D tensors `(I_d, J_d, R_d, R_{d+1})`, `R_{D+1} = R_1`, of one floating dtype.

    Returns:
        `(∏ I_d, ∏ J_d)`, dtype of the cores.

    Raises:
        ShapeError: the cores are no ring.

    Source: arXiv 2501.08727, tensor-ring matrix decomposition.
    """
    check_matrix_ring(cores)
    if len(cores) == 1:
        return cores[0].diagonal(dim1=2, dim2=3).sum(-1)
    chain, last = open_chain(cores[:-1]), cores[-1]
    (i, j, a, b), (k, m, _, _) = chain.shape, last.shape
    closed = chain.reshape(i * j, a * b) @ last.permute(3, 2, 0, 1).reshape(a * b, k * m)
    return closed.view(i, j, k, m).permute(2, 0, 3, 1).reshape(k * i, m * j)


def open_chain(cores: Sequence[Tensor]) -> Tensor:
    """The open product of neighbouring four-dimensional cores.

    Args:
        cores: tensors `(I_d, J_d, R_d, R_{d+1})`; the ends need not close.

    Returns:
        `(∏ I_d, ∏ J_d, R_1, R_{D+1})`.
    """
    chain = cores[0]
    for core in cores[1:]:
        (i, j, a, b), (k, m, _, c) = chain.shape, core.shape
        product = chain.reshape(i * j * a, b) @ core.permute(2, 0, 1, 3).reshape(b, k * m * c)
        # (k, i) is flattened with k, the newer and slower mode, in front
        chain = product.view(i, j, a, k, m, c).permute(3, 0, 4, 1, 2, 5).reshape(k * i, m * j, a, c)
    return chain


def chain_from_cores(cores: Sequence[Tensor]) -> Tensor:
    """The open product `P[i] = B^1[i_1] ··· B^D[i_D]` of three-dimensional cores.

    Args:
        cores: D tensors `(I_d, R_d, R_{d+1})`; the ends need not close.

    Returns:
        `(∏ I_d, R_1, R_{D+1})`.
    """
    chain = cores[0]
    for core in cores[1:]:
        (i, a, b), (k, _, c) = chain.shape, core.shape
        product = chain.reshape(i * a, b) @ core.permute(1, 0, 2).reshape(b, k * c)
        chain = product.view(i, a, k, c).permute(2, 0, 1, 3).reshape(k * i, a, c)
    return chain


def low_rank_from_cores(row_cores: Sequence[Tensor], column_cores: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The exact low-rank view of a tensor-ring residual: `Δ = L·Rᵀ`.

    `Δ[i, j] = tr(B[i] C[j])` with `B[i] = B^1[i_1]···B^D[i_D]` of shape `(R_1, S)` and `C[j]` of shape `(S, R_1)`, so
    `Δ[i, j] = Σ_{a,b} B[i][a, b]·C[j][b, a]`: a LoRA of rank `R_1·S`, which is `R²` for a uniform ring.

    Args:
        row_cores: tensors `(I_d, R_d, R_{d+1})` over the output dimension.
        column_cores: tensors `(J_d, R_d, R_{d+1})` over the input dimension, the ring going on from the last row core
            and closing with the first.

    Returns:
        L `(∏ I_d, R_1·S)` and R `(∏ J_d, R_1·S)`.

    Raises:
        ShapeError: the cores are no ring.
    """
    check_ring([*row_cores, *column_cores], "tensor-ring residual")
    left = chain_from_cores(row_cores)
    right = chain_from_cores(column_cores)
    return left.flatten(1), right.transpose(1, 2).flatten(1)


def delta_from_cores(row_cores: Sequence[Tensor], column_cores: Sequence[Tensor]) -> Tensor:
    """The dense residual `Δ[i, j] = tr(B^1[i_1] ··· B^D[i_D] C^1[j_1] ··· C^E[j_E])`.

    Args:
        row_cores: tensors `(I_d, R_d, R_{d+1})` over the output dimension.
        column_cores: tensors `(J_d, R_d, R_{d+1})` over the input dimension.

    Returns:
        `(∏ I_d, ∏ J_d)`.

    Source: arXiv 2501.08727, tensor-ring residual.
    """
    left, right = low_rank_from_cores(row_cores, column_cores)
    return left @ right.T
