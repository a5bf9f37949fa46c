from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import BOFTConfig, get_peft_model
from torch import Tensor, nn

from tests.helpers import cayley_oracle
from trlora import CheckpointError, ShapeError, SpecError
from trlora.cayley import upper_of
from trlora.transforms import ButterflyTransform, ButterflyTransformSpec

SHAPES = [(15, 3, 1), (16, 4, 2), (24, 2, 3), (24, 6, 3), (40, 4, 2)]
"""Features, block size, factors."""


def random_member(features: int, block: int, factors: int) -> ButterflyTransform:
    entries = block * (block - 1) // 2
    return ButterflyTransform(0.5 * torch.randn(factors, features // block, entries, dtype=torch.float64), block)


def no_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own product with more than one factor needs its CUDA kernel, which puts blocks on a diagonal."""
    kernel = SimpleNamespace(forward=lambda blocks: [torch.stack([torch.block_diag(*factor) for factor in blocks])])
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: kernel)


@pytest.mark.parametrize(("features", "block", "factors"), SHAPES)
def test_it_is_its_matrix(features: int, block: int, factors: int) -> None:
    transform = random_member(features, block, factors)
    matrix = transform.matrix().detach()
    x, weight = torch.randn(2, 3, features, dtype=torch.float64), torch.randn(7, features, dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ matrix.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transform.multiply(weight), weight @ matrix, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(features), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("features", "block", "factors"), SHAPES)
def test_it_is_the_product_of_permuted_block_diagonals(features: int, block: int, factors: int) -> None:
    """The permutations written out: index by index, from which half of which block."""
    transform = random_member(features, block, factors)
    expected, half = np.eye(features), block // 2
    for i in range(factors):
        diagonal = np.zeros((features, features))
        for n in range(features // block):
            q, entries = np.zeros((block, block)), iter(transform.skew[i, n].tolist())
            for row in range(block):
                for column in range(row + 1, block):
                    q[row, column] = next(entries)
                    q[column, row] = -q[row, column]
            diagonal[n * block : (n + 1) * block, n * block : (n + 1) * block] = cayley_oracle(q)
        permutation = np.eye(features)
        if i:
            permutation = np.zeros((features, features))
            for k in range(features):
                group, inside = divmod(k, block * 2**i)
                number, place = divmod(inside, half)
                parity, pair = divmod(number, 2**i)  # the even halves of a group come first, then the odd ones
                permutation[k, group * block * 2**i + (2 * pair + parity) * half + place] = 1
        expected = expected @ permutation @ diagonal @ permutation.T
    np.testing.assert_allclose(transform.matrix().detach().numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("features", "block", "factors"), SHAPES)
def test_pefts_boft_has_the_same_matrix(
    features: int, block: int, factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_cuda_kernel(monkeypatch)
    config = BOFTConfig(boft_block_size=block, boft_n_butterfly_factor=factors, target_modules=["0"])
    model = nn.Sequential(nn.Linear(features, 7, dtype=torch.float64))
    peft = get_peft_model(model, config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    layer: Any = peft.base_model.model[0]  # type: ignore[index, union-attr]
    rotation: Tensor = layer.boft_R["default"]
    with torch.no_grad():
        rotation.copy_(0.5 * torch.randn_like(rotation))
    matrix, _ = layer.get_delta_weight("default")
    upper = upper_of(0.5 * (rotation - rotation.transpose(-1, -2))).detach()
    found = ButterflyTransform(upper, block).matrix()
    torch.testing.assert_close(found, matrix.T, rtol=1e-6, atol=1e-6)  # PEFT's identity is float32


@pytest.mark.parametrize(
    ("features", "block", "factors", "message"),
    [(45, 4, 1, "does not divide"), (24, 4, 3, "that block_size"), (18, 3, 2, "even")],
)
def test_what_makes_no_butterfly_is_refused(features: int, block: int, factors: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ButterflyTransformSpec(block, factors).build(features)
    if features % block == 0:
        with pytest.raises(ShapeError, match=message):
            random_member(features, block, factors)


def test_tensors_that_contradict_the_spec_are_refused() -> None:
    with pytest.raises(CheckpointError, match="factors"):
        ButterflyTransformSpec(4, 2).from_tensors({"skew": torch.zeros(1, 4, 6)})
    with pytest.raises(CheckpointError, match="expected 6"):
        ButterflyTransformSpec(4, 1).from_tensors({"skew": torch.zeros(1, 4, 5)})
