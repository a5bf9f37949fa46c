from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.helpers import SQUARE_RINGS, bits, delta_oracle, matrix_oracle
from trlora.ring import identity_cores, matrix_from_cores, residual_cores


@pytest.mark.parametrize(("modes", "ranks"), SQUARE_RINGS)
def test_the_start_is_the_identity(modes: Sequence[int], ranks: Sequence[int]) -> None:
    cores = identity_cores(modes, ranks, dtype=torch.float64)
    following = [*ranks[1:], ranks[0]]
    assert [tuple(core.shape) for core in cores] == [
        (mode, mode, rank, after) for mode, rank, after in zip(modes, ranks, following, strict=True)
    ]
    np.testing.assert_allclose(matrix_oracle(cores), np.eye(math.prod(modes)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_uniform_ranks_start_as_in_proposition_1(rank: int) -> None:
    for core, mode in zip(identity_cores((3, 5, 2), (rank,) * 3, dtype=torch.float64), (3, 5, 2), strict=True):
        for r in range(rank):
            for s in range(rank):
                np.testing.assert_allclose(core[:, :, r, s].numpy(), np.eye(mode) / rank, rtol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (2, 8, 2), (1, 4, 16)])
def test_powers_of_two_start_at_the_exact_identity(ranks: Sequence[int], dtype: torch.dtype) -> None:
    matrix = matrix_from_cores(identity_cores((3, 5, 2), ranks, dtype=dtype))
    assert bits(matrix) == bits(torch.eye(30, dtype=dtype))


def test_cores_are_parameters_of_their_own() -> None:
    """Each entry has its memory: an expanded view would train all blocks as one."""
    core = identity_cores((3, 5), (2, 2))[0]
    core[0, 0, 0, 0] = 7
    assert (core == 7).sum() == 1


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2, 2, 2), (3, 2, 4, 1, 2, 5)])
def test_the_residual_starts_at_zero(ranks: Sequence[int]) -> None:
    rows, columns = residual_cores((3, 2, 5), (5, 1, 3), ranks)
    assert not delta_oracle(rows, columns).any()
    assert not rows[0].any()
    assert all(core.any() for core in [*rows[1:], *columns])
    shapes = [tuple(core.shape) for core in [*rows, *columns]]
    following = [*ranks[1:], ranks[0]]
    assert shapes == list(zip((3, 2, 5, 5, 1, 3), ranks, following, strict=True))


def test_the_other_cores_have_the_deviation_of_the_paper() -> None:
    """σ = √n_out / n_in with n_out = R and n_in = I_d·R; for ranks that differ, the rank behind and the rank before."""
    modes, ranks = (7, 50, 31, 40, 9, 30), (20, 30, 10, 25, 40, 15)
    rows, columns = residual_cores(modes[:3], modes[3:], ranks, generator=torch.Generator().manual_seed(0))
    for core, mode, rank, after in zip([*rows, *columns], modes, ranks, [*ranks[1:], ranks[0]], strict=True):
        expected = math.sqrt(after) / (mode * rank) if core is not rows[0] else 0.0
        entries = core.double()
        tolerance = 4 / math.sqrt(2 * core.numel())  # four standard errors
        assert entries.std().item() == pytest.approx(expected, rel=tolerance)
        assert abs(entries.mean().item()) <= 4 * expected / math.sqrt(core.numel())


def test_the_residual_start_is_decided_by_the_seed() -> None:
    def start(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = residual_cores((3, 5), (2, 7), (2, 3, 1, 2), generator=generator, dtype=dtype)
        return [*rows, *columns]

    assert [bits(core) for core in start(5)] == [bits(core) for core in start(5)]
    assert bits(start(5)[1]) != bits(start(6)[1])
    for low, full in zip(start(5, torch.bfloat16), start(5), strict=True):
        assert bits(low) == bits(full.bfloat16())  # a seed means the same numbers in every dtype
