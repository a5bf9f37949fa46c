"""The Tucker form of a convolution's weight, as LyCORIS writes it: what several residuals share."""

from __future__ import annotations

import torch
from torch import Tensor

from trlora.errors import ShapeError


def tucker_matrix(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`M[o, (i, h, w)] = Σ_pq core[p, q, h, w]·a[p, o]·b[q, i]`, flattened as torch flattens a convolution's weight.

    Args:
        core: (r, q, height, width).
        a: (r, out).
        b: (q, in).

    Returns:
        (out, in·height·width).
    """
    return a.T @ tucker_right(core, b)


def tucker_right(core: Tensor, b: Tensor) -> Tensor:
    """The right factor of `tucker_matrix`, (r, in·height·width): `M = aᵀ · right`."""
    return torch.einsum("pqhw,qi->pihw", core, b).flatten(1)


def check_tucker(core: Tensor, a: Tensor, b: Tensor, names: str) -> None:
    """Raises `ShapeError` unless the three fit together."""
    if core.ndim != 4 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise ShapeError(
            f"{names}: shapes {tuple(core.shape)}, {tuple(a.shape)} and {tuple(b.shape)} found, expected (r, q, height, "
            "width), (r, out) and (q, in)"
        )
