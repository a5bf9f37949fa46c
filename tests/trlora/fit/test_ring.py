"""Sweeps over the cores of rings against least squares on a design matrix that is built entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import Array, delta_oracle, matrix_oracle, random_matrix_ring, random_ring
from trlora.fit.ring import sweep_residual_, sweep_transform_
from trlora.fit.solve import improved
from trlora.ring import delta_from_cores, matrix_from_cores

RESIDUAL_RINGS = [
    ((5,), (4,), (2, 3)),
    ((3, 2), (2, 5), (2, 2, 2, 2)),
    ((3, 1, 2), (1, 3, 2), (2, 1, 3, 2, 1, 2)),
]


def least_squares(made: Callable[[], Array], core: Tensor, target: Array) -> float:
    """The least error over one core, whose entries `made` is linear in: a column of the design for each, by setting it."""
    kept, columns = core.clone(), []
    for entry in range(core.numel()):
        core.zero_()
        core.view(-1)[entry] = 1
        columns.append(made().reshape(-1))
    core.copy_(kept)
    design = np.stack(columns, axis=1)
    solution, *_ = np.linalg.lstsq(design, target.reshape(-1), rcond=None)
    return float(np.linalg.norm(target.reshape(-1) - design @ solution))


@pytest.mark.parametrize(("rows", "columns", "ranks"), RESIDUAL_RINGS)
def test_a_sweep_of_a_residual_ends_in_the_optimum_of_its_last_core(
    rows: tuple[int, ...], columns: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    cores = random_ring([*rows, *columns], ranks)
    row_cores, column_cores = cores[: len(rows)], cores[len(rows) :]
    target = torch.randn(math.prod(rows), math.prod(columns), dtype=torch.float64)
    sweep_residual_(target, row_cores, column_cores)
    error = np.linalg.norm(target.numpy() - delta_oracle(row_cores, column_cores))
    best = least_squares(lambda: delta_oracle(row_cores, column_cores), cores[-1], target.numpy())
    assert error == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("modes", "ranks", "rows"),
    [((5,), (2,), 4), ((3, 5), (2, 2), 4), ((3, 5), (2, 3), 20), ((3, 1, 4), (2, 3, 2), 4), ((2, 3, 2), (2, 2, 2), 20)],
)
def test_a_sweep_of_a_transform_ends_in_the_optimum_of_its_last_core(
    modes: tuple[int, ...], ranks: tuple[int, ...], rows: int
) -> None:
    cores = random_matrix_ring(modes, modes, ranks)
    weight = torch.randn(rows, math.prod(modes), dtype=torch.float64)
    target = torch.randn(rows, math.prod(modes), dtype=torch.float64)

    def made() -> Array:
        return weight.numpy() @ matrix_oracle(cores)

    sweep_transform_(cores, weight.T @ weight, weight.T @ target)
    best = least_squares(made, cores[-1], target.numpy())
    assert np.linalg.norm(target.numpy() - made()) == pytest.approx(best, rel=1e-7, abs=1e-7)


def errors(sweep: Callable[[], None], made: Callable[[], Tensor], target: Tensor, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(float(torch.linalg.vector_norm(target - made())))
        sweep()
    return found


def never_rises(found: Sequence[float]) -> bool:
    return all(after <= before * (1 + 1e-9) for before, after in pairwise(found))


def test_sweeps_never_raise_the_error() -> None:
    rows, columns, ranks = (3, 2, 4), (2, 5, 3), (2, 3, 2, 2, 3, 2)
    cores = random_ring([*rows, *columns], ranks)
    target = torch.randn(24, 30, dtype=torch.float64)
    found = errors(
        lambda: sweep_residual_(target, cores[:3], cores[3:]),
        lambda: delta_from_cores(cores[:3], cores[3:]),
        target,
        30,
    )
    assert never_rises(found)
    assert found[-1] < 0.99 * found[1]

    weight, square = torch.randn(20, 30, dtype=torch.float64), random_matrix_ring(columns, columns, (2, 3, 2))
    target = torch.randn(20, 30, dtype=torch.float64)
    found = errors(
        lambda: sweep_transform_(square, weight.T @ weight, weight.T @ target),
        lambda: weight @ matrix_from_cores(square),
        target,
        30,
    )
    assert never_rises(found)
    assert found[-1] < 0.99 * found[1]


def test_a_step_stays_where_nothing_is_known() -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))
    right, current = torch.tensor([[4.0], [0.0], [3.0]]).double(), torch.tensor([[7.0], [8.0], [9.0]]).double()
    torch.testing.assert_close(improved(gram, right, current), torch.tensor([[2.0], [8.0], [3.0]]).double())
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    torch.testing.assert_close(improved(nothing, torch.zeros(3, 1, dtype=torch.float64), current), current)
