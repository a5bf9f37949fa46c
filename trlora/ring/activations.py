"""A tensor-ring matrix times activations, without forming the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trlora.errors import ShapeError
from trlora.ring.shapes import check_matrix_ring


def apply_cores(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """`x @ T.T` for the tensor-ring matrix T of `cores`, core by core.

    Args:
        cores: D tensors `(I_d, J_d, R_d, R_{d+1})`, `R_{D+1} = R_1`.
        x: `(*batch, ∏ J_d)`, same dtype as the cores.

    Returns:
        `(*batch, ∏ I_d)`.

    Raises:
        ShapeError: the cores are no ring, or the last dimension of x is not `∏ J_d`.
    """
    check_matrix_ring(cores)
    columns = [int(core.shape[1]) for core in cores]
    if x.shape[-1] != math.prod(columns):
        raise ShapeError(f"activations of width {x.shape[-1]} given, expected {math.prod(columns)} (modes {columns})")
    batch = x.shape[:-1]
    first, last = cores[0], cores[-1]
    if len(cores) == 1:
        return x @ first.diagonal(dim1=2, dim2=3).sum(-1).T
    # little-endian: the slowest mode stands first, so mode d is the last of the untouched ones
    state = x.reshape(-1, math.prod(columns[1:]), columns[0])
    state = torch.einsum("npj,ijar->npiar", state, first)  # (n, untouched, done, ring start, ring now)
    for d in range(1, len(cores) - 1):
        n, _, done, start, rank = state.shape
        state = state.reshape(n, math.prod(columns[d + 1 :]), columns[d], done, start, rank)
        state = torch.einsum("npjqar,ijrs->npiqas", state, cores[d]).flatten(2, 3)
    closed = torch.einsum("njqar,ijra->niq", state, last)
    return closed.reshape(*batch, closed.shape[1] * closed.shape[2])
