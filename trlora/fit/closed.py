"""Closed forms: optima of single members, and starts for what has none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SPREAD = 0.1
"""Size of the entries of ranks that a start has no use for, against the others."""
_UNSEEN = 1e-12
"""Eigenvalues below this share of the greatest are rounding."""


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (rows, rank) and R (columns, rank) with `‖matrix − L·Rᵀ‖_F` least (Eckart and Young, 1936), equally long columns.

    Columns beyond the matrix's smaller side are zero.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, vt[:rank].T * root
    missing = rank - len(root)
    if missing > 0:
        left, right = (torch.nn.functional.pad(factor, (0, missing)) for factor in (left, right))
    return left, right


def reduced_rank(gram: Tensor, cross: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (n, rank) and R (m, rank) with `‖target − W·L·Rᵀ‖_F` least (reduced-rank regression: Izenman, 1975), where
    `gram = WᵀW` (n, n) and `cross = Wᵀ·target` (n, m). Directions that W does not see stay zero."""
    values, vectors = torch.linalg.eigh(gram)
    seen = values > float(values[-1]) * _UNSEEN
    root = torch.where(seen, values, 1.0).rsqrt() * seen
    left, right = truncated_svd(root[:, None] * (vectors.T @ cross), rank)
    return vectors @ (root[:, None] * left), right


def rotation(cross: Tensor) -> Tensor:
    """The orthogonal matrices O of determinant 1 with `tr(Oᵀ·cross)` greatest: of all of them, those with which W·O is
    nearest to a target where `cross = Wᵀ·target` (orthogonal Procrustes: Schönemann, 1966; with the determinant, Kabsch).

    Args:
        cross: (…, b, b).
    """
    u, _, vt = torch.linalg.svd(cross)
    turn = torch.linalg.det(u @ vt).sign()
    u[..., -1] *= turn[..., None]  # the direction that counts least
    return u @ vt


def skew_of_rotation(rotations: Tensor) -> Tensor:
    """Q with `(I + Q)(I − Q)⁻¹` the rotation, the inverse of `trlora.cayley.cayley`; huge for a half turn, which has none.

    Args:
        rotations: (…, b, b).
    """
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype)
    skew = torch.linalg.solve(rotations + eye * (1 + 1e-12), rotations - eye, left=False)
    return (skew - skew.transpose(-1, -2)) / 2


def kronecker_blocks(matrix: Tensor, shapes: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """The matrix rearranged, (a·c, b·d), so that `W_1 ⊗ W_2` becomes `vec(W_1)·vec(W_2)ᵀ` (Van Loan and Pitsianis, 1993).

    Args:
        shapes: of W_1, (a, c), and of W_2, (b, d).
    """
    (a, c), (b, d) = shapes
    return matrix.view(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)


def ring_svd(
    matrix: Tensor, modes: tuple[Sequence[int], Sequence[int]], ranks: Sequence[int], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Cores of a tensor ring near a matrix, by truncated singular value decompositions one after another.

    As TR-SVD (Zhao et al., arXiv 1606.05535), but the ring is cut at the two places where rows and columns meet: one
    decomposition of the matrix, whose R_1·S terms become the two ranks there, and then one for each core. It is no optimum,
    for how the terms are laid out over the two ranks is a choice.

    Args:
        matrix: (rows, columns), float64.
        modes: of the rows and of the columns, little-endian.
        ranks: of the ring, row cores first.
        generator: of the small numbers that fill what is beyond the matrix's own ranks.

    Returns:
        The cores of the rows and of the columns, `(I_d, R_d, R_{d+1})`.
    """
    rows, columns = modes
    first, middle = ranks[0], ranks[len(rows)]
    left, right = truncated_svd(matrix, first * middle)
    row_cores = _chain_svd(left.view(-1, first, middle), rows, [*ranks[: len(rows)], middle])
    turned = right.view(-1, first, middle).transpose(1, 2)
    column_cores = _chain_svd(turned, columns, [*ranks[len(rows) :], first])
    _fill_([*row_cores, *column_cores], generator)
    return row_cores, column_cores


def _chain_svd(chain: Tensor, modes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Cores of an open chain (∏ modes, first, last), TT-SVD (Oseledets, 2011) over its modes, the fastest first."""
    first, last = chain.shape[1:]
    rest = chain.transpose(0, 1).reshape(first, *reversed(modes), last)
    rest = rest.permute(0, *range(len(modes), 0, -1), len(modes) + 1)  # fastest mode first
    cores = []
    for d, mode in enumerate(modes[:-1]):
        left, right = truncated_svd(rest.reshape(ranks[d] * mode, -1), ranks[d + 1])
        cores.append(left.view(ranks[d], mode, ranks[d + 1]).transpose(0, 1).contiguous())
        rest = right.T
    cores.append(rest.reshape(ranks[len(modes) - 1], modes[-1], last).transpose(0, 1).contiguous())
    return cores


def _fill_(cores: Sequence[Tensor], generator: torch.Generator) -> None:
    """Give ranks that no core uses small numbers on one of their two sides: they add nothing, and may be used."""
    for core, following in zip(cores, [*cores[1:], cores[0]], strict=True):
        unused = (core.abs().amax((0, 1)) == 0) & (following.abs().amax((0, 2)) == 0)
        noise = torch.randn(core.shape, generator=generator, dtype=core.dtype)
        core[..., unused] = noise[..., unused] * (_SPREAD * float(core.abs().max()) or 1.0)


def matrix_ring_svd(
    matrix: Tensor, modes: Sequence[int], ranks: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Cores `(I_d, I_d, R_d, R_{d+1})` of a square tensor-ring matrix near one, by `ring_svd` over pairs of modes.

    Args:
        matrix: (n, n), float64.
    """
    count, slow_first = len(modes), list(reversed(modes))
    pairs = matrix.reshape(slow_first * 2).permute([axis for k in range(count) for axis in (k, count + k)])
    cut = max(1, count // 2)  # the cores that lie in front of it are the fastest, so the last pairs
    fast, slow = [m * m for m in modes[:cut]], [m * m for m in modes[cut:]]
    if slow:
        turned = pairs.reshape(math.prod(slow), math.prod(fast)).T
        cores = [core for side in ring_svd(turned, (fast, slow), ranks, generator) for core in side]
    else:
        core = torch.zeros(fast[0], ranks[0], ranks[0], dtype=matrix.dtype)
        core[:, 0, 0] = pairs.reshape(-1)
        cores = [core]
    return [core.view(mode, mode, *core.shape[1:]).contiguous() for core, mode in zip(cores, modes, strict=True)]
