from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import random_matrix_ring, random_ring
from trlora import ShapeError
from trlora.ring import (
    apply_cores,
    check_matrix_ring,
    check_ranks,
    check_ring,
    delta_from_cores,
    identity_penalty,
    matrix_from_cores,
    orthogonal_penalty,
    product_cores,
    ranks_of,
)


def test_ranks_are_read_from_the_cores() -> None:
    assert ranks_of(random_matrix_ring((3, 2, 5), (2, 5, 3), (2, 3, 4))) == (2, 3, 4)
    assert ranks_of(random_ring((3, 2, 5, 7), (1, 3, 2, 4))) == (1, 3, 2, 4)


def test_one_rank_stands_for_all() -> None:
    assert check_ranks(3, 4, "layer") == (3, 3, 3, 3)
    assert check_ranks([1, 3, 2], 3, "layer") == (1, 3, 2)


@pytest.mark.parametrize("rank", [0, -1, [2, 3], [2, 3, 4, 5], [2, 0, 2], []])
def test_ranks_that_make_no_ring_are_refused(rank: int | list[int]) -> None:
    with pytest.raises(ShapeError, match=r"layer.*3"):
        check_ranks(rank, 3, "layer")


def test_a_ring_that_does_not_close_is_refused() -> None:
    good = random_matrix_ring((3, 5, 2), (2, 3, 5), (2, 3, 4))
    check_matrix_ring(good)
    with pytest.raises(ShapeError, match=r"core 0.*rank 3.*core 1.*rank 4"):
        check_matrix_ring([good[0], good[2], good[1]])
    with pytest.raises(ShapeError, match=r"core 1.*rank 4.*core 0.*rank 2"):
        check_matrix_ring(good[:2])  # open at the end


def test_a_ring_of_other_dimensions_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"core 0.*\(3, 2, 3\).*4 dimensions"):
        check_matrix_ring(random_ring((3, 5), (2, 3)))
    with pytest.raises(ShapeError, match=r"core 0.*3 dimensions"):
        check_ring(random_matrix_ring((3, 5), (2, 3), (2, 3)))


@pytest.mark.parametrize(
    "function",
    [
        matrix_from_cores,
        identity_penalty,
        orthogonal_penalty,
        lambda cores: apply_cores(cores, torch.zeros(15)),
        lambda cores: product_cores(cores, cores),
        lambda cores: delta_from_cores([core[:, 0] for core in cores], []),
    ],
)
@pytest.mark.parametrize("count", [0, 1])
def test_every_function_on_cores_checks_them(function: Callable[[list[Tensor]], object], count: int) -> None:
    open_ring = [torch.zeros(3, 3, 2, 4), torch.zeros(5, 5, 3, 2)][: 2 * count]
    with pytest.raises(ShapeError):
        function(open_ring)
