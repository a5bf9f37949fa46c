"""A weight times a ring, against the dense matrix by the formula."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trlora import ShapeError
from trlora.ring import identity_cores, matrix_from_cores, modes_of, multiply_cores

CASES = [
    ([(3, 5)], [2]),
    ([(2, 3), (4, 1)], [2, 3]),
    ([(3, 2), (1, 4), (5, 3)], [2, 3, 1]),
    ([(2, 2), (3, 3), (2, 5), (4, 1)], [1, 2, 3, 2]),
]


@pytest.mark.parametrize(("modes", "ranks"), CASES)
def test_against_the_dense_matrix(modes: list[tuple[int, int]], ranks: list[int]) -> None:
    closed = [*ranks, ranks[0]]
    cores = [torch.randn(i, j, closed[d], closed[d + 1], dtype=torch.float64) for d, (i, j) in enumerate(modes)]
    dense = matrix_from_cores(cores)
    weight = torch.randn(7, dense.shape[0], dtype=torch.float64)
    torch.testing.assert_close(multiply_cores(weight, cores), weight @ dense, rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    cores = [torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *c: multiply_cores(w, c), (weight, *cores))


@pytest.mark.parametrize("size", [320, 640, 768, 1280])
def test_it_is_less_work_than_the_dense_product(size: int) -> None:
    cores = identity_cores(modes_of(size), [2, 2, 2])
    weight = torch.zeros(320, size)
    with FlopCounterMode(display=False) as ring_work:
        multiply_cores(weight, cores)
    with FlopCounterMode(display=False) as dense_work:
        _ = weight @ weight.new_zeros(size, size)
    assert ring_work.get_total_flops() < 0.8 * dense_work.get_total_flops()


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="7 columns"):
        multiply_cores(torch.zeros(2, 7), identity_cores([2, 3], [2, 2]))
