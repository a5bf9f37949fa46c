from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from trlora import CheckpointError, ShapeError
from trlora.residuals import HadamardResidual, HadamardResidualSpec


def flat(out: int, inputs: int, rank: int) -> dict[str, Tensor]:
    a, b = (out, rank), (rank, inputs)
    return {f"hada_w{n}_{x}": torch.randn(s, dtype=torch.float64) for n in "12" for x, s in (("a", a), ("b", b))}


def tucker(out: int, channels: int, rank: int, kernel: tuple[int, int]) -> dict[str, Tensor]:
    shapes = {"w{}_a": (rank, out), "w{}_b": (rank, channels), "t{}": (rank, rank, *kernel)}
    return {f"hada_{name.format(n)}": torch.randn(s, dtype=torch.float64) for n in "12" for name, s in shapes.items()}


@pytest.mark.parametrize(("out", "inputs", "rank"), [(3, 5, 1), (7, 4, 2), (30, 20, 2)])
def test_it_is_the_entrywise_product(out: int, inputs: int, rank: int) -> None:
    tensors = flat(out, inputs, rank)
    w = {name: tensor.numpy() for name, tensor in tensors.items()}
    expected = np.zeros((out, inputs))
    for i, j in product(range(out), range(inputs)):
        one = sum(w["hada_w1_a"][i, r] * w["hada_w1_b"][r, j] for r in range(rank))
        two = sum(w["hada_w2_a"][i, r] * w["hada_w2_b"][r, j] for r in range(rank))
        expected[i, j] = 1.5 * one * two
    residual = HadamardResidual(tensors, 1.5 * rank)
    np.testing.assert_allclose(residual.delta().detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    x = torch.randn(2, inputs, dtype=torch.float64)  # thin or dense, whichever is less work
    torch.testing.assert_close(residual(x), x @ torch.from_numpy(expected).T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("out", "channels", "rank", "kernel"), [(7, 4, 2, (3, 3)), (5, 3, 1, (1, 3))])
def test_the_tucker_form_of_a_convolution(out: int, channels: int, rank: int, kernel: tuple[int, int]) -> None:
    tensors = tucker(out, channels, rank, kernel)
    w = {name: tensor.numpy() for name, tensor in tensors.items()}
    expected = np.ones((out, channels, *kernel))
    for o, c, y, x in product(range(out), range(channels), range(kernel[0]), range(kernel[1])):
        for n in "12":
            expected[o, c, y, x] *= sum(
                w[f"hada_t{n}"][p, q, y, x] * w[f"hada_w{n}_a"][p, o] * w[f"hada_w{n}_b"][q, c]
                for p, q in product(range(rank), range(rank))
            )
    residual = HadamardResidual(tensors, rank)
    assert (residual.out_features, residual.in_features) == (out, channels * kernel[0] * kernel[1])
    np.testing.assert_allclose(residual.delta().detach().numpy(), expected.reshape(out, -1), rtol=1e-11, atol=1e-11)


def test_factors_that_do_not_meet_are_refused() -> None:
    tensors = flat(7, 5, 2)
    with pytest.raises(ShapeError, match="hada_w1"):
        HadamardResidual(tensors | {"hada_w1_b": torch.zeros(3, 5)}, 2)
    with pytest.raises(ShapeError, match="equal shapes"):
        HadamardResidual(tensors | {"hada_w1_a": torch.zeros(8, 2)}, 2)
    with pytest.raises(ShapeError, match="hada_t1"):
        HadamardResidual(tucker(7, 5, 2, (3, 3)) | {"hada_t1": torch.zeros(2, 3, 3, 3)}, 2)


def test_half_of_a_pair_is_refused() -> None:
    tensors = flat(7, 5, 2)
    del tensors["hada_w2_b"]
    with pytest.raises(CheckpointError, match="hada_w2_b: missing"):
        HadamardResidualSpec(2).from_tensors(tensors)
    tensors = tucker(7, 5, 2, (3, 3))
    del tensors["hada_t2"]
    with pytest.raises(CheckpointError, match="hada_t2: missing"):
        HadamardResidualSpec(2, kernel=(3, 3)).from_tensors(tensors)
