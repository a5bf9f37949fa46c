import math

import numpy as np
import pytest
import torch

from trexport.parity.metrics import cosine, max_abs, psnr_db, relative_l2

A = np.array([[1.0, -2.0, 3.0], [0.5, 0.0, 4.0]])
B = np.array([[1.5, -2.0, 2.0], [0.5, 1.0, 4.0]])


def test_against_numpy() -> None:
    found, expected = torch.tensor(A), torch.tensor(B)
    assert max_abs(found, expected) == np.abs(A - B).max()
    assert relative_l2(found, expected) == pytest.approx(np.linalg.norm(A - B) / np.linalg.norm(B))
    assert cosine(found, expected) == pytest.approx((A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B))
    mse = ((A - B) ** 2).mean()
    assert psnr_db(found, expected) == pytest.approx(10 * math.log10((B.max() - B.min()) ** 2 / mse))


def test_equal_tensors() -> None:
    x = torch.randn(3, 4).half()
    assert (max_abs(x, x), relative_l2(x, x), psnr_db(x, x)) == (0, 0, math.inf)
    assert cosine(x, x) == pytest.approx(1)
    zero = torch.zeros(3)
    assert (relative_l2(zero, zero), cosine(zero, zero), relative_l2(zero + 1, zero)) == (0, 1, math.inf)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_looks_equal(value: float) -> None:
    x = torch.ones(4)
    y = x.clone()
    y[1] = value
    for found, expected in ((y, x), (x, y)):
        assert not max_abs(found, expected) <= 1e9
        assert not relative_l2(found, expected) <= 0.5
        assert not cosine(found, expected) >= 0.9
        assert not psnr_db(found, expected) >= 10
