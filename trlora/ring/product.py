"""The product of two tensor-ring matrices, core by core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trlora.errors import ShapeError
from trlora.ring.shapes import check_matrix_ring


def product_cores(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The cores of `X·Yᵀ`, `C^d[i, j] = Σ_l A^d[i, l] ⊗ B^d[j, l]`.

    Args:
        a: cores of X, `(I_d, L_d, R_d, R_{d+1})`.
        b: cores of Y, `(J_d, L_d, S_d, S_{d+1})`.

    Returns:
        D cores `(I_d, J_d, R_d·S_d, R_{d+1}·S_{d+1})`.

    Raises:
        ShapeError: no rings, another number of cores, or column modes that differ.

    Source: arXiv 2501.08727, Proposition 2.
    """
    check_matrix_ring(a, "left factor")
    check_matrix_ring(b, "right factor")
    columns_a, columns_b = [c.shape[1] for c in a], [c.shape[1] for c in b]
    if columns_a != columns_b:
        raise ShapeError(f"the factors have column modes {columns_a} and {columns_b}, expected the same")
    return [torch.einsum("ilab,jlcd->ijacbd", x, y).flatten(4, 5).flatten(2, 3) for x, y in zip(a, b, strict=True)]
