from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.helpers import MATRIX_RINGS, delta_oracle, matrix_oracle, random_matrix_ring, random_ring
from trlora.ring import chain_from_cores, delta_from_cores, low_rank_from_cores, matrix_from_cores

RESIDUALS = [
    ((5,), (7,), (2, 3)),
    ((3, 4), (5, 3), (2, 3, 1, 4)),
    ((3, 2, 5), (5, 1, 3), (2, 2, 2, 2, 2, 2)),
    ((3, 2, 2), (5, 1, 3), (3, 2, 4, 1, 2, 5)),
    ((2, 3, 1, 2), (3, 2, 1, 3), (2, 3, 1, 2, 4, 2, 1, 3)),
    ((3, 5), (2, 3, 2), (2, 3, 4, 1, 2)),
]
"""Row modes, column modes and ranks; the last has another order on each side."""


@pytest.mark.parametrize(("rows", "columns", "ranks"), MATRIX_RINGS)
def test_the_matrix_is_the_trace_formula(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> None:
    cores = random_matrix_ring(rows, columns, ranks)
    matrix = matrix_from_cores(cores)
    assert matrix.dtype == torch.float64
    np.testing.assert_allclose(matrix.numpy(), matrix_oracle(cores), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("rows", "columns", "ranks"), RESIDUALS)
def test_the_delta_is_the_trace_formula(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> None:
    cores = random_ring([*rows, *columns], ranks)
    row_cores, column_cores = cores[: len(rows)], cores[len(rows) :]
    expected = delta_oracle(row_cores, column_cores)
    np.testing.assert_allclose(delta_from_cores(row_cores, column_cores).numpy(), expected, rtol=1e-11, atol=1e-11)

    left, right = low_rank_from_cores(row_cores, column_cores)
    seam = ranks[0] * ranks[len(rows)]
    assert left.shape == (expected.shape[0], seam)
    assert right.shape == (expected.shape[1], seam)
    np.testing.assert_allclose((left @ right.T).numpy(), expected, rtol=1e-11, atol=1e-11)


def test_a_tensor_ring_residual_is_a_lora_of_rank_r_squared() -> None:
    """Not of a lower one: random cores reach R²."""
    cores = random_ring((3, 2, 5, 5, 1, 3), (2,) * 6)
    delta = delta_from_cores(cores[:3], cores[3:])
    assert delta.shape == (30, 15)
    assert torch.linalg.matrix_rank(delta).item() == 4


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_ring_of_rank_one_is_a_kronecker_product_with_the_first_mode_innermost(order: int) -> None:
    cores = random_matrix_ring((3, 2, 5, 1)[:order], (2, 5, 3, 3)[:order], (1,) * order)
    expected = np.ones((1, 1))
    for core in cores:
        expected = np.kron(core[:, :, 0, 0].numpy(), expected)
    np.testing.assert_allclose(matrix_from_cores(cores).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_ring_may_be_turned_round_when_its_modes_turn_with_it() -> None:
    """tr(ABC) = tr(BCA): the entries are the same, at rotated indices."""
    cores = random_matrix_ring((3, 5, 2), (2, 3, 5), (2, 3, 4))
    matrix = matrix_from_cores(cores).reshape(2, 5, 3, 5, 3, 2)
    turned = matrix_from_cores([*cores[1:], cores[0]]).reshape(3, 2, 5, 2, 5, 3)
    torch.testing.assert_close(turned, matrix.permute(2, 0, 1, 5, 3, 4), rtol=1e-12, atol=1e-12)


def test_a_chain_is_the_open_product() -> None:
    first, second, third = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2, 4), (5, 4, 3), (2, 3, 7)))
    chain = chain_from_cores([first, second, third])
    assert chain.shape == (30, 2, 7)
    for i in range(30):
        expected = first[i % 3] @ second[i // 3 % 5] @ third[i // 15]
        torch.testing.assert_close(chain[i], expected, rtol=1e-12, atol=1e-12)


def test_matrices_have_gradients() -> None:
    cores = [core.requires_grad_() for core in random_matrix_ring((2, 3), (3, 2), (2, 3))]
    assert torch.autograd.gradcheck(lambda *c: matrix_from_cores(c), cores)
    ring = [core.requires_grad_() for core in random_ring((2, 3, 3, 1), (2, 3, 1, 2))]
    assert torch.autograd.gradcheck(lambda *c: delta_from_cores(c[:2], c[2:]), ring)
