from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import matrix_oracle, product_oracle, random_matrix_ring
from trlora import ShapeError
from trlora.ring import matrix_from_cores, product_cores

# modes of X's rows, of Y's rows, of their common columns; ranks of X, of Y
PAIRS = [
    ((5,), (3,), (7,), (2,), (3,)),
    ((3, 5), (2, 3), (4, 3), (2, 3), (1, 2)),
    ((3, 5, 2), (1, 3, 4), (5, 2, 3), (2, 2, 2), (2, 2, 2)),
    ((3, 1, 2), (5, 2, 3), (2, 3, 1), (2, 3, 1), (3, 1, 2)),
    ((3, 1, 2, 3), (1, 2, 3, 2), (2, 3, 1, 2), (2, 1, 3, 2), (1, 2, 2, 3)),
]


@pytest.mark.parametrize(("rows_x", "rows_y", "columns", "ranks_x", "ranks_y"), PAIRS)
def test_the_product_of_rings_is_the_product_of_matrices(rows_x, rows_y, columns, ranks_x, ranks_y) -> None:
    x, y = random_matrix_ring(rows_x, columns, ranks_x), random_matrix_ring(rows_y, columns, ranks_y)
    cores = product_cores(x, y)
    for core, expected in zip(cores, product_oracle(x, y), strict=True):
        np.testing.assert_allclose(core.numpy(), expected, rtol=1e-11, atol=1e-11)
    dense = matrix_oracle(x) @ matrix_oracle(y).T
    np.testing.assert_allclose(matrix_from_cores(cores).numpy(), dense, rtol=1e-10, atol=1e-10)


def test_factors_with_other_columns_are_refused() -> None:
    x, y = random_matrix_ring((3, 5), (4, 3), (2, 2)), random_matrix_ring((3, 5), (3, 4), (2, 2))
    with pytest.raises(ShapeError, match=r"\[4, 3\].*\[3, 4\]"):
        product_cores(x, y)
    with pytest.raises(ShapeError):
        product_cores(x, random_matrix_ring((3, 5, 1), (4, 3, 1), (2, 2, 2)))


def test_the_product_has_gradients() -> None:
    x, y = random_matrix_ring((2, 3), (3, 2), (2, 1)), random_matrix_ring((1, 2), (3, 2), (1, 2))
    inputs = [core.requires_grad_() for core in (*x, *y)]
    assert torch.autograd.gradcheck(lambda *c: tuple(product_cores(c[:2], c[2:])), inputs)
