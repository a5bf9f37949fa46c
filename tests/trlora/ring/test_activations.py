from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.helpers import MATRIX_RINGS, LargestTensor, matrix_oracle, random_matrix_ring
from trlora import ShapeError
from trlora.ring import apply_cores


@pytest.mark.parametrize(("rows", "columns", "ranks"), MATRIX_RINGS)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0, 3)], ids=str)
def test_activations_are_multiplied_by_the_matrix(
    rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int], batch: tuple[int, ...]
) -> None:
    cores = random_matrix_ring(rows, columns, ranks)
    x = torch.randn(*batch, math.prod(columns), dtype=torch.float64)
    y = apply_cores(cores, x)
    assert y.shape == (*batch, math.prod(rows))
    np.testing.assert_allclose(y.numpy(), x.numpy() @ matrix_oracle(cores).T, rtol=1e-11, atol=1e-11)


def test_activations_need_not_be_contiguous() -> None:
    cores = random_matrix_ring((3, 5, 2), (2, 3, 5), (2, 3, 4))
    x = torch.randn(30, 3, 4, dtype=torch.float64).permute(2, 1, 0)
    assert torch.equal(apply_cores(cores, x), apply_cores(cores, x.contiguous()))


def test_activations_have_gradients() -> None:
    cores = random_matrix_ring((2, 3, 1), (3, 1, 2), (2, 1, 3))
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (*cores, x)]
    assert torch.autograd.gradcheck(lambda *t: apply_cores(t[:-1], t[-1]), inputs)


def test_activations_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"16.*15"):
        apply_cores(random_matrix_ring((3, 5), (5, 3), (2, 2)), torch.zeros(2, 16, dtype=torch.float64))


def test_the_matrix_is_never_formed() -> None:
    cores = random_matrix_ring((8, 10, 16), (8, 10, 16), (2, 2, 2))
    x = torch.randn(1, 1280, dtype=torch.float64)
    with LargestTensor() as largest:
        apply_cores(cores, x)
    assert 1280 <= largest.entries < 1280 * 1280 // 100
