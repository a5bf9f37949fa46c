"""Least squares by small normal equations, solved so that a step never makes things worse."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 1e-13
"""Of the greatest eigenvalue: what holds back directions that the data do not determine."""


def improved(gram: Tensor, right: Tensor, current: Tensor) -> Tensor:
    """The minimiser of `xᵀ·gram·x − 2·xᵀ·right`, near `current` along directions in which nothing is to be gained.

    A proximal step: it solves for the change of x, damped by a tiny share of the greatest eigenvalue. So singular systems
    (a ring's cores are never unique) do no harm, and whatever is solved, the objective does not rise.

    Args:
        gram: (…, n, n), positive semidefinite, float64.
        right: (…, n, k).
        current: (…, n, k).
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    damped = gram + (scale * _DAMPING + torch.finfo(gram.dtype).tiny) * eye
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():  # rounding took more than the damping gave
        factor = torch.linalg.cholesky(gram + (scale * 1e-9 + torch.finfo(gram.dtype).tiny) * eye)
    return current + torch.cholesky_solve(right - gram @ current, factor)
