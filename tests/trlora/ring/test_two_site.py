"""A ring as a sum of Kronecker products, against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trlora import ShapeError
from trlora.ring import change_by_cores, identity_cores, matrix_from_cores, modes_of, two_site, two_sites

CASES = [([5], [2]), ([3, 4], [2, 3]), ([3, 4, 5], [2, 3, 1]), ([2, 3, 5, 4], [1, 2, 3, 2])]


def ring_of(modes: list[int], ranks: list[int], amount: float = 0.3) -> list[torch.Tensor]:
    cores = identity_cores(modes, ranks, dtype=torch.float64)
    return [core + amount * torch.randn(core.shape, dtype=torch.float64) for core in cores]


@pytest.mark.parametrize("precision", [2.0**-24, 0.0])
@pytest.mark.parametrize(("modes", "ranks"), CASES)
def test_every_cut_gives_the_matrix(modes: list[int], ranks: list[int], precision: float) -> None:
    cores = ring_of(modes, ranks)
    change = matrix_from_cores(cores)
    change -= torch.eye(len(change), dtype=torch.float64)
    for cut in range(1, len(modes) + 1):
        sites = two_sites(cores, cut, precision)
        found = torch.kron(sites.fixed, torch.eye(sites.fast.shape[1], dtype=torch.float64))
        for fast, slow in zip(sites.fast, sites.slow, strict=True):
            assert abs(fast.trace()) < 1e-12
            found += torch.kron(slow, fast)  # the slow index stands in front
        assert (found - change).norm() <= max(precision, 1e-13) * len(change) ** 0.5


def test_equal_slices_have_one_term() -> None:
    cores = [core.mean((2, 3), keepdim=True).expand_as(core) for core in ring_of([4, 8, 10], [2, 3, 2], 0.01)]
    nearly = [core + 1e-10 * torch.randn(core.shape, dtype=torch.float64) for core in cores]
    assert [len(two_sites(nearly, cut).fast) for cut in (1, 2, 3)] == [1, 1, 1]
    assert len(two_sites(ring_of([4, 8, 10], [2, 3, 2], 0.01), 1).fast) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("modes", "ranks"), CASES)
@pytest.mark.parametrize("at_once", [5 * 2**20, 2**14])
@pytest.mark.parametrize("fewest", [("cpu",), ()], ids=["fewest terms", "all terms, as on a GPU"])
def test_the_change_of_a_weight(
    modes: list[int],
    ranks: list[int],
    dtype: torch.dtype,
    at_once: int,
    fewest: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(two_site, "_BYTES", {"cpu": at_once})
    monkeypatch.setattr(two_site, "_FEWEST", fewest)
    cores = ring_of(modes, ranks, 0.1)
    matrix = matrix_from_cores(cores)
    weight = torch.randn(300, len(matrix), dtype=torch.float64).to(dtype)
    expected = weight.double() @ matrix - weight.double()
    found = change_by_cores(weight, [core.to(dtype) for core in cores])
    assert found.dtype == dtype
    assert change_by_cores(weight[:0], [core.to(dtype) for core in cores]).shape == (0, len(matrix))
    assert (found.double() - expected).norm() <= 8 * torch.finfo(dtype).eps * weight.double().norm()


def test_what_a_weight_takes_on_other_devices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms of every row at once would be 36 times the weight."""
    monkeypatch.setattr(two_site, "_BYTES", {})
    monkeypatch.setattr(two_site, "_OTHER_BYTES", 2**16)
    monkeypatch.setattr(two_site, "_FEWEST", ())
    cores = ring_of([4, 8, 10], [6, 6, 6], 0.1)
    weight = torch.randn(300, 320, dtype=torch.float64)
    taken: list[int] = []
    new_empty = Tensor.new_empty

    def watched(tensor: Tensor, *shape: int) -> Tensor:
        made = new_empty(tensor, *shape)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(Tensor, "new_empty", watched)
    found = change_by_cores(weight, cores)
    assert max(taken) == weight.nbytes  # the result itself
    matrix = matrix_from_cores(cores)
    assert (found - (weight @ matrix - weight)).norm() <= 1e-13 * found.norm()


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_nothing_changes_at_the_start(rank: int) -> None:
    cores = identity_cores(modes_of(320), [rank] * 3)
    assert change_by_cores(torch.randn(3, 320), cores).abs().max() < 1e-6
    assert rank in (3, 5) or not change_by_cores(torch.randn(3, 320), cores).any()


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="7 columns"):
        change_by_cores(torch.zeros(2, 7), identity_cores([2, 3], [2, 2]))
