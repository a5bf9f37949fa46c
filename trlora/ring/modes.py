"""Splitting a dimension into modes, and the index order that goes with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trlora.errors import ShapeError


def modes_of(size: int, order: int = 3) -> tuple[int, ...]:
    """Split `size` into `order` ascending modes whose product is `size`.

    Chosen are the modes with the fewest odd ones, then the smallest sum, then the smallest greatest mode. This gives the
    modes that the budget table of arXiv 2501.08727 implies: 320 → (4, 8, 10), 640 → (8, 8, 10), 768 → (8, 8, 12),
    1280 → (8, 10, 16). Mode 1 is allowed, so that every size works: a prime p gives (1, …, 1, p).

    Raises:
        ShapeError: `size` or `order` is below 1.
    """
    if size < 1 or order < 1:
        raise ShapeError(f"cannot split {size} into {order} modes: both must be at least 1")
    return min(_splits(size, order), key=lambda modes: (sum(m % 2 for m in modes), sum(modes), max(modes)))


def check_modes(modes: Sequence[int], size: int, what: str) -> tuple[int, ...]:
    """The modes as a tuple of ints, or a `ShapeError` when they do not multiply to `size`."""
    result = tuple(int(m) for m in modes)
    if not result or any(m < 1 for m in result) or math.prod(result) != size:
        raise ShapeError(
            f"{what}: modes {result} multiply to {math.prod(result)}, expected {size}; "
            f"leave modes null for {modes_of(size, max(1, len(result)))}"
        )
    return result


def index_of(digits: Sequence[int], modes: Sequence[int]) -> int:
    """The flat index of mode indices `digits`, little-endian: `i = i_1 + i_2·n_1 + i_3·n_1·n_2 + …`."""
    index, stride = 0, 1
    for digit, mode in zip(digits, modes, strict=True):
        index += digit * stride
        stride *= mode
    return index


def _splits(size: int, order: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """Every ascending split of `size` into `order` factors of at least `least`."""
    if order == 1:
        if size >= least:
            yield (size,)
        return
    factor = least
    while factor**order <= size:
        if size % factor == 0:
            for rest in _splits(size // factor, order - 1, factor):
                yield (factor, *rest)
        factor += 1
