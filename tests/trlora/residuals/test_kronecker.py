from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from trlora import CheckpointError, ShapeError
from trlora.residuals import KroneckerResidual, KroneckerResidualSpec

A, B, C, D, R = 3, 7, 5, 4, 2
"""W_1 is A × C, W_2 is B × D."""


def normal(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"lokr_{name}": torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


FORMS: dict[str, dict[str, tuple[int, ...]]] = {
    "whole": {"w1": (A, C), "w2": (B, D)},
    "second factored": {"w1": (A, C), "w2_a": (B, R), "w2_b": (R, D)},
    "first factored": {"w1_a": (A, R), "w1_b": (R, C), "w2": (B, D)},
    "both factored": {"w1_a": (A, R), "w1_b": (R, C), "w2_a": (B, R), "w2_b": (R, D)},
    "tucker": {"w1": (A, C), "t2": (R, R, 2, 3), "w2_a": (R, B), "w2_b": (R, D)},
    "tucker, first factored": {"w1_a": (A, R), "w1_b": (R, C), "t2": (R, R, 2, 3), "w2_a": (R, B), "w2_b": (R, D)},
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_kronecker_product(form: str) -> None:
    tensors = normal(**FORMS[form])
    w = {name.removeprefix("lokr_"): tensor.numpy() for name, tensor in tensors.items()}
    one = w["w1"] if "w1" in w else w["w1_a"] @ w["w1_b"]
    if "t2" in w:
        two = np.zeros((B, D, 2, 3))
        for o, c, y, x, p, q in product(range(B), range(D), range(2), range(3), range(R), range(R)):
            two[o, c, y, x] += w["t2"][p, q, y, x] * w["w2_a"][p, o] * w["w2_b"][q, c]
        two = two.reshape(B, -1)
    else:
        two = w["w2"] if "w2" in w else w["w2_a"] @ w["w2_b"]
    width = two.shape[1]
    expected = np.zeros((A * B, C * width))
    for a, b, c, d in product(range(A), range(B), range(C), range(width)):
        expected[a * B + b, c * width + d] = 0.75 * one[a, c] * two[b, d]
    residual = KroneckerResidual(tensors, 0.75)
    assert (residual.out_features, residual.in_features) == expected.shape
    np.testing.assert_allclose(residual.delta().detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    x = torch.randn(2, 3, C * width, dtype=torch.float64)
    torch.testing.assert_close(residual(x), x @ torch.from_numpy(expected).T, rtol=1e-11, atol=1e-11)
    left, right = residual.low_rank()
    np.testing.assert_allclose((left @ right.T).detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    assert left.shape[1] <= (R if "w1_a" in w else min(A, C)) * (R if "w2_a" in w else min(B, D))


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_tells_its_form(form: str) -> None:
    tensors = normal(**FORMS[form])
    rank = None if form == "whole" else R
    member = KroneckerResidualSpec(rank, 3.0).from_tensors(dict(tensors))
    assert set(member.state_dict()) == set(tensors)
    assert member.scaling == (1.0 if rank is None else 1.5)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "whole"])
def test_half_of_a_pair_is_refused(form: str) -> None:
    for leaf in [name for name in FORMS[form] if name.endswith(("_a", "_b"))]:
        tensors = normal(**FORMS[form])
        del tensors[f"lokr_{leaf}"]
        with pytest.raises(CheckpointError, match=f"lokr_{leaf}: missing"):
            KroneckerResidualSpec(R).from_tensors(tensors)


def test_ranks_that_contradict_the_spec_are_refused() -> None:
    with pytest.raises(CheckpointError, match="rank"):
        KroneckerResidualSpec(3).from_tensors(normal(**FORMS["both factored"]))
    with pytest.raises(ShapeError, match="lokr_w2"):
        KroneckerResidualSpec(R).from_tensors(normal(w1=(A, C), w2_a=(B, R), w2_b=(3, D)))
