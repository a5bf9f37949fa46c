from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import LargestTensor, delta_oracle, random_ring
from trlora import CheckpointError, ShapeError
from trlora.residuals import LowRankResidual, TensorRingResidual, TensorRingResidualSpec

RINGS = [
    ((28,), (45,), (2, 3)),
    ((7, 4), (5, 9), (3, 3, 3, 3)),
    ((2, 2, 7), (3, 3, 5), (3, 2, 4, 1, 2, 5)),
    ((2, 7, 1, 2), (3, 1, 5, 3), (2, 3, 1, 4, 2, 1, 3, 2)),
]


@pytest.mark.parametrize(("rows", "columns", "ranks"), RINGS)
def test_it_is_the_ring_of_its_cores(rows: tuple[int, ...], columns: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    cores = random_ring([*rows, *columns], ranks)
    residual = TensorRingResidual(cores[: len(rows)], cores[len(rows) :])
    assert (residual.out_features, residual.in_features) == (28, 45)
    expected = delta_oracle(cores[: len(rows)], cores[len(rows) :])
    np.testing.assert_allclose(residual.delta().detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    assert list(residual.state_dict()) == [
        *(f"row_core.{d}" for d in range(len(rows))),
        *(f"column_core.{d}" for d in range(len(columns))),
    ]


@pytest.mark.parametrize(("rows", "columns", "ranks"), RINGS)
def test_it_is_a_lora_of_rank_r_squared(
    rows: tuple[int, ...], columns: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    cores = random_ring([*rows, *columns], ranks)
    residual = TensorRingResidual(cores[: len(rows)], cores[len(rows) :])
    left, right = (factor.detach() for factor in residual.low_rank())
    rank = ranks[0] * ranks[len(rows)]
    assert left.shape == (28, rank)
    lora = LowRankResidual(right.T, left, rank)
    x = torch.randn(2, 3, 45, dtype=torch.float64)
    torch.testing.assert_close(lora(x), residual(x), rtol=1e-11, atol=1e-11)


def test_it_never_forms_its_delta() -> None:
    residual = TensorRingResidualSpec(rank=2).build(1280, 768)
    with LargestTensor() as largest:
        residual(torch.randn(1, 1280))
    assert largest.entries < 1280 * 768 // 100


def test_modes_of_another_size_are_refused() -> None:
    spec = TensorRingResidualSpec(order=2, modes=((4, 7), (5, 8)))
    with pytest.raises(ShapeError, match=r"columns.*\(5, 8\).*40.*45"):
        spec.build(45, 28)
    with pytest.raises(ShapeError, match=r"rows.*\(4, 7\).*28.*27"):
        spec.build(40, 27)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorRingResidualSpec(order=2, rank=2), r"rank.*2.*\[2, 3, 1, 4\]"),
        (TensorRingResidualSpec(2, (2, 3, 1, 4), ((7, 4), (9, 5))), r"modes.*9, 5.*5, 9.*null"),
        (TensorRingResidualSpec(order=3), r"row_core\.2.*missing"),
    ],
)
def test_a_spec_that_contradicts_the_tensors_is_refused(spec: TensorRingResidualSpec, message: str) -> None:
    cores = random_ring((7, 4, 5, 9), (2, 3, 1, 4))
    names = ["row_core.0", "row_core.1", "column_core.0", "column_core.1"]
    with pytest.raises(CheckpointError, match=message):
        spec.from_tensors(dict(zip(names, cores, strict=True)))
