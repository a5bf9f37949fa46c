"""Closed forms against NumPy, SciPy and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from tests.helpers import delta_oracle, matrix_oracle, random_orthogonal
from trlora.cayley import cayley
from trlora.fit.closed import (
    kronecker_blocks,
    matrix_ring_svd,
    ring_svd,
    rotation,
    skew_of_rotation,
    truncated_svd,
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("rank", [1, 4, 7, 9])
def test_truncated_svd_leaves_the_small_singular_values(shape: tuple[int, int], rank: int) -> None:
    matrix = random(*shape)
    left, right = truncated_svd(matrix, rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (shape[1], rank)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert torch.linalg.vector_norm(matrix - left @ right.T) == pytest.approx(
        np.sqrt((values[rank:] ** 2).sum()), abs=1e-12
    )


def test_rotation_is_procrustes_where_that_is_a_rotation() -> None:
    found = 0
    for _ in range(20):
        weight, target = random(9, 5), random(9, 5)
        expected, _ = scipy.linalg.orthogonal_procrustes(weight.numpy(), target.numpy())
        mine = rotation((weight.T @ target)[None])[0]
        torch.testing.assert_close(mine @ mine.T, torch.eye(5, dtype=torch.float64))
        assert float(torch.linalg.det(mine)) == pytest.approx(1)
        if np.linalg.det(expected) > 0:
            np.testing.assert_allclose(mine.numpy(), expected, atol=1e-10)
            found += 1
    assert 0 < found < 20


def test_rotation_is_the_best_of_all_angles() -> None:
    for _ in range(5):
        weight, target = random(4, 2), random(4, 2)

        def error(angle: float, weight: Tensor = weight, target: Tensor = target) -> float:
            c, s = math.cos(angle), math.sin(angle)
            turned = weight @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
            return float(torch.linalg.vector_norm(target - turned))

        best = min(error(2 * math.pi * k / 3600) for k in range(3600))
        mine = float(torch.linalg.vector_norm(target - weight @ rotation(weight.T @ target)))
        assert mine <= best
        assert mine == pytest.approx(best, rel=1e-5)


def test_skew_of_a_rotation_gives_it_back() -> None:
    turns = torch.stack([random_orthogonal(5) for _ in range(4)])
    turns[torch.linalg.det(turns) < 0, :, 0] *= -1
    skew = skew_of_rotation(turns)
    torch.testing.assert_close(skew, -skew.transpose(1, 2))
    torch.testing.assert_close(cayley(skew), turns, rtol=0, atol=1e-9)


def test_kronecker_blocks_make_a_product_of_two_vectors() -> None:
    first, second = random(2, 3), random(4, 5)
    blocks = kronecker_blocks(torch.from_numpy(np.kron(first.numpy(), second.numpy())), ((2, 3), (4, 5)))
    torch.testing.assert_close(blocks, torch.outer(first.flatten(), second.flatten()))


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [((5,), (7,), (5, 1)), ((3, 4), (2, 5), (3, 9, 4, 8)), ((2, 3, 2), (3, 2, 2), (3, 6, 8, 4, 12, 6))],
)
def test_ring_svd_is_exact_with_ranks_enough(
    rows: tuple[int, ...], columns: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    matrix = random(math.prod(rows), math.prod(columns))
    found = ring_svd(matrix, (rows, columns), ranks, seeded())
    closed = [*ranks, ranks[0]]
    for d, core in enumerate(itertools.chain(*found)):
        assert core.shape == ((*rows, *columns)[d], closed[d], closed[d + 1])
    np.testing.assert_allclose(delta_oracle(*found), matrix.numpy(), atol=1e-11)


@pytest.mark.parametrize(("modes", "ranks"), [((6,), (2,)), ((2, 3), (2, 2)), ((2, 2, 3), (2, 2, 9))])
def test_matrix_ring_svd_is_exact_with_ranks_enough(modes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    matrix = random(math.prod(modes), math.prod(modes))
    cores = matrix_ring_svd(matrix, modes, ranks, seeded())
    closed = [*ranks, ranks[0]]
    for d, core in enumerate(cores):
        assert core.shape == (modes[d], modes[d], closed[d], closed[d + 1])
    np.testing.assert_allclose(matrix_oracle(cores), matrix.numpy(), atol=1e-11)
