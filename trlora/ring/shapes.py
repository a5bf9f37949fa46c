"""What a valid ring of cores is, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trlora.errors import ShapeError


def check_matrix_ring(
    cores: Sequence[Tensor], what: str = "tensor-ring matrix", names: Sequence[str] | None = None
) -> None:
    """Raise `ShapeError` unless `cores[d]` is `(I_d, J_d, R_d, R_{d+1})` and the ring closes (`R_{D+1} = R_1`).

    `names` are the cores' names for the message, which then begins with the one that is wrong."""
    _check(cores, 4, what, names)


def check_ring(cores: Sequence[Tensor], what: str = "tensor ring", names: Sequence[str] | None = None) -> None:
    """Raise `ShapeError` unless `cores[d]` is `(I_d, R_d, R_{d+1})` and the ring closes (`R_{D+1} = R_1`).

    `names` are the cores' names for the message, which then begins with the one that is wrong."""
    _check(cores, 3, what, names)


def ranks_of(cores: Sequence[Tensor]) -> tuple[int, ...]:
    """The ranks `(R_1, …, R_D)`; the ring closes with `R_1`."""
    return tuple(int(core.shape[-2]) for core in cores)


def check_ranks(rank: int | Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """One rank for all of `count` cores, or one each, as a tuple.

    Raises:
        ShapeError: a rank below 1, or another number of ranks than cores.
    """
    ranks = (rank,) * count if isinstance(rank, int) else tuple(int(r) for r in rank)
    if len(ranks) != count or any(r < 1 for r in ranks):
        raise ShapeError(f"{what}: rank {rank!r} given, expected one positive rank or {count} of them")
    return ranks


def _check(cores: Sequence[Tensor], dims: int, what: str, names: Sequence[str] | None) -> None:
    if not cores:
        raise ShapeError(f"{what}: no cores given, expected at least one")
    begin = "" if names else f"{what}: "
    names = names or [f"core {d}" for d in range(len(cores))]
    for d, core in enumerate(cores):
        if core.ndim != dims:
            raise ShapeError(f"{begin}{names[d]} has shape {tuple(core.shape)}, expected {dims} dimensions")
        following = cores[(d + 1) % len(cores)]
        if following.ndim == dims and core.shape[-1] != following.shape[-2]:
            raise ShapeError(
                f"{begin}{names[d]} of shape {tuple(core.shape)} ends in rank {core.shape[-1]}, but "
                f"{names[(d + 1) % len(cores)]} of shape {tuple(following.shape)} begins with rank "
                f"{following.shape[-2]}"
            )
