from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import MATRIX_RINGS, random_matrix_ring, random_ring
from trlora.ring import (
    apply_cores,
    apply_cores_flops,
    low_rank_flops,
    matrix_from_cores,
    matrix_from_cores_flops,
    matrix_ring_parameters,
    ring_parameters,
)

# the counter sees products of matrices: every rank at least two, so that each step is one
COUNTED = [
    ((3, 5), (2, 7), (2, 2)),
    ((3, 4), (5, 3), (2, 3)),
    ((3, 5, 2), (2, 3, 5), (2, 3, 4)),
    ((3, 1, 5, 2), (2, 7, 1, 3), (2, 3, 4, 5)),
]


@pytest.mark.parametrize(("rows", "columns", "ranks"), MATRIX_RINGS)
def test_parameters_are_the_entries_of_the_cores(
    rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]
) -> None:
    cores = random_matrix_ring(rows, columns, ranks)
    assert matrix_ring_parameters(rows, columns, ranks) == sum(core.numel() for core in cores)
    ring = random_ring(rows, ranks)
    assert ring_parameters(rows, ranks) == sum(core.numel() for core in ring)


@pytest.mark.parametrize(("rows", "columns", "ranks"), COUNTED)
def test_operations_of_the_matrix_are_those_of_a_real_run(
    rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]
) -> None:
    cores = random_matrix_ring(rows, columns, ranks)
    with FlopCounterMode(display=False) as counter:
        matrix_from_cores(cores)
    assert matrix_from_cores_flops(rows, columns, ranks) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("rows", "columns", "ranks"), COUNTED)
@pytest.mark.parametrize("batch", [(1,), (4, 3)])
def test_operations_on_activations_are_those_of_a_real_run(
    rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int], batch: tuple[int, ...]
) -> None:
    cores = random_matrix_ring(rows, columns, ranks)
    x = torch.randn(*batch, math.prod(columns), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        apply_cores(cores, x)
    assert apply_cores_flops(rows, columns, ranks, math.prod(batch)) == counter.get_total_flops() > 0


def test_order_one_sums_the_diagonal_of_the_ranks() -> None:
    """R matrices of 5 × 7 are added up; the counter sees no additions, so they are counted by hand."""
    assert matrix_from_cores_flops((5,), (7,), (3,)) == 2 * 35
    with FlopCounterMode(display=False) as counter:
        apply_cores(random_matrix_ring((5,), (7,), (3,)), torch.randn(4, 3, 7, dtype=torch.float64))
    assert apply_cores_flops((5,), (7,), (3,), 12) == counter.get_total_flops() + 2 * 35


def test_operations_of_a_low_rank_map_are_those_of_a_real_run() -> None:
    left, right, x = torch.randn(28, 4), torch.randn(45, 4), torch.randn(2, 3, 45)
    with FlopCounterMode(display=False) as counter:
        y = (x @ right) @ left.T
    assert y.shape == (2, 3, 28)
    assert low_rank_flops(28, 45, 4, 6) == counter.get_total_flops()
