"""Orthogonal matrices from skew-symmetric ones, in batches: what the orthogonal transforms share."""

from __future__ import annotations

import torch
from torch import Tensor


def skew_from_upper(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from their entries above the diagonal, row by row.

    Args:
        entries: (…, size·(size−1)/2).

    Returns:
        (…, size, size), `Qᵀ = −Q`.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    flat = entries.flatten(0, -2)
    batch = torch.arange(flat.shape[0], device=entries.device)[:, None]
    upper = flat.new_zeros(flat.shape[0], size, size).index_put((batch, rows, columns), flat)
    return (upper - upper.transpose(1, 2)).reshape(*entries.shape[:-1], size, size)


def upper_of(matrices: Tensor) -> Tensor:
    """The entries above the diagonal, row by row, of (…, size, size): the inverse of `skew_from_upper`."""
    size = matrices.shape[-1]
    rows, columns = torch.triu_indices(size, size, 1, device=matrices.device)
    return matrices[..., rows, columns]


def cayley(skew: Tensor) -> Tensor:
    """The Cayley map `(I + Q)(I − Q)⁻¹` of each matrix of (…, b, b): orthogonal, of determinant 1.

    Computed in float32 at least, for there is no half-precision solve.
    """
    q = skew.to(torch.promote_types(skew.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, eye + q, left=False).to(skew.dtype)


def inverse_cayley(matrices: Tensor) -> Tensor:
    """The skew matrices whose Cayley map orthogonal matrices (…, b, b) are, `Q = (O + I)⁻¹(O − I)`, its skew part; NaN or
    Inf for one that turns something by half a circle, which no Cayley map does."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    skew, _ = torch.linalg.solve_ex(matrices + eye, matrices - eye)
    return (skew - skew.transpose(-1, -2)) / 2


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """The Cayley map with its inverse cut off as a Neumann series, `I + 2Q + 2Q² + … + Q^(terms−1)`: nearly orthogonal.

    As PEFT's OFT has it (arXiv 2506.19847), its short series included: one term is I, two are `I + 2Q`, and three are as
    four, `I + 2Q + 2Q² + Q³`.
    """
    total = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand(skew.shape)
    if terms < 2:
        return total
    total = total + 2 * skew
    if terms == 2:
        return total
    power = skew
    for exponent in range(2, max(terms, 4)):
        power = power @ skew
        total = total + (power if exponent == max(terms, 4) - 1 else 2 * power)
    return total
