from __future__ import annotations

import math
from itertools import combinations_with_replacement

import pytest

from tests.helpers import digits_of
from trlora import ShapeError
from trlora.ring import check_modes, index_of, modes_of


@pytest.mark.parametrize(
    ("size", "modes"),
    [(320, (4, 8, 10)), (640, (8, 8, 10)), (768, (8, 8, 12)), (1280, (8, 10, 16))],
)
def test_the_modes_of_the_paper(size: int, modes: tuple[int, ...]) -> None:
    assert modes_of(size) == modes


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 45, 97, 210, 1024, 2048, 5120])
def test_any_size_splits_into_ascending_modes(size: int, order: int) -> None:
    modes = modes_of(size, order)
    assert len(modes) == order
    assert math.prod(modes) == size
    assert list(modes) == sorted(modes)
    assert min(modes) >= 1


@pytest.mark.parametrize(("size", "order"), [(60, 3), (90, 3), (96, 2), (120, 4), (45, 3), (2880, 3)])
def test_of_all_splits_the_fewest_odd_then_the_most_balanced_is_taken(size: int, order: int) -> None:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    every = [c for c in combinations_with_replacement(divisors, order) if math.prod(c) == size]
    ranking = sorted((sum(m % 2 for m in c), sum(c), max(c), c) for c in every)
    assert modes_of(size, order) == ranking[0][-1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_prime_is_one_mode_beside_ones(order: int) -> None:
    assert modes_of(13, order) == (1,) * (order - 1) + (13,)


@pytest.mark.parametrize(("size", "order"), [(0, 3), (-4, 3), (12, 0), (12, -1)])
def test_what_cannot_be_split_is_refused(size: int, order: int) -> None:
    with pytest.raises(ShapeError, match=f"{size}.*{order}"):
        modes_of(size, order)


@pytest.mark.parametrize("modes", [(5,), (3, 4), (2, 3, 5), (3, 1, 5, 2)])
def test_indices_are_little_endian(modes: tuple[int, ...]) -> None:
    for index in range(math.prod(modes)):
        assert index_of(digits_of(index, modes), modes) == index
    assert index_of([1] + [0] * (len(modes) - 1), modes) == 1  # the first mode runs fastest


def test_digits_and_modes_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        index_of((1, 2), (3, 4, 5))


def test_modes_are_checked_against_the_size() -> None:
    assert check_modes([3, 1, 5], 15, "layer") == (3, 1, 5)


@pytest.mark.parametrize("modes", [[], [3, 4], [0, 15], [-3, -5], [15, 0]])
def test_modes_that_do_not_multiply_to_the_size_are_refused(modes: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"a\.to_q.*15"):
        check_modes(modes, 15, "a.to_q")
