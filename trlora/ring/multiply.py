"""A weight times a tensor-ring matrix, without forming the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trlora.errors import ShapeError
from trlora.ring.contract import open_chain
from trlora.ring.shapes import check_matrix_ring


def multiply_cores(weight: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """`weight @ T` for the tensor-ring matrix T of `cores`.

    The ring is cut into two open chains, G over the fast modes and H over the slow ones, so that
    `T[(i_b, i_a), (j_b, j_a)] = Σ_{r,s} G[i_a, j_a, r, s]·H[i_b, j_b, s, r]`. The weight then meets two small matrices, laid
    out such that nothing is transposed in between. For 1280 columns and rank 2 that is 0.3 of the dense product's work.

    Args:
        weight: `(rows, ∏ I_d)`, dtype of the cores.
        cores: D tensors `(I_d, J_d, R_d, R_{d+1})`, `R_{D+1} = R_1`.

    Returns:
        `(rows, ∏ J_d)`.

    Raises:
        ShapeError: the cores are no ring, or the weight has another number of columns.
    """
    cut = best_cut(cores, weight.shape[-1])
    if len(cores) == 1:
        return weight @ cores[0].diagonal(dim1=2, dim2=3).sum(-1)
    fast, slow = open_chain(cores[:cut]), open_chain(cores[cut:])
    i_a, j_a, first, middle = fast.shape
    i_b, j_b = slow.shape[:2]
    left = fast.permute(0, 2, 3, 1).reshape(i_a, first * middle * j_a)
    right = slow.permute(1, 0, 3, 2).reshape(j_b, i_b * first * middle)
    rows = weight.shape[0]
    met = (weight.reshape(rows * i_b, i_a) @ left).view(rows, i_b * first * middle, j_a)
    return torch.matmul(right, met).reshape(rows, j_b * j_a)


def best_cut(cores: Sequence[Tensor], columns: int) -> int:
    """The number of cores in front of the cut that costs the least; of a single core 1.

    Args:
        columns: of the weight that is to be multiplied.

    Raises:
        ShapeError: the cores are no ring, or the weight has another number of columns.
    """
    check_matrix_ring(cores)
    expected = math.prod(int(core.shape[0]) for core in cores)
    if columns != expected:
        raise ShapeError(f"a weight of {columns} columns given, expected {expected}")
    return min(range(1, len(cores)), key=lambda d: _flops_a_row(cores, d), default=1)


def _flops_a_row(cores: Sequence[Tensor], cut: int) -> int:
    """What a cut costs for each row of the weight."""
    i_a = math.prod(core.shape[0] for core in cores[:cut])
    j_a = math.prod(core.shape[1] for core in cores[:cut])
    i_b = math.prod(core.shape[0] for core in cores[cut:])
    j_b = math.prod(core.shape[1] for core in cores[cut:])
    ranks = cores[0].shape[2] * cores[cut].shape[2]
    return 2 * i_b * i_a * ranks * j_a + 2 * j_b * i_b * ranks * j_a
