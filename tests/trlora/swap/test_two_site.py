from __future__ import annotations

import pytest
import torch

from tests.helpers import IN, RESIDUALS, TRANSFORMS, Member, adapter_of, dense_delta, dense_matrix, trained
from trlora.swap.two_site import power_of_two, ring_sites, splits_of, two_sites


@pytest.mark.parametrize("member", TRANSFORMS, ids=str)
def test_a_transform_is_the_sum_of_its_terms(member: Member) -> None:
    transform = trained(adapter_of(member).transform)
    for n_lo in splits_of(transform):
        sites = two_sites(transform, n_lo)
        n_hi = IN // n_lo
        found = torch.kron(sites.fixed, torch.eye(n_lo, dtype=torch.float64))
        for fast, slow in zip(sites.fast, sites.slow, strict=True):
            assert 1 <= fast.abs().max() < 2
            found += torch.kron(slow, fast)  # the slow index stands in front
        assert sites.fixed.shape == (n_hi, n_hi)
        torch.testing.assert_close(
            found, dense_matrix(transform) - torch.eye(IN, dtype=torch.float64), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("member", RESIDUALS, ids=str)
def test_a_ring_is_the_sum_over_its_ranks(member: Member) -> None:
    residual = trained(adapter_of(None, member).residual)
    found = {n_lo: ring_sites(residual, n_lo) for n_lo in (1, 3, 5, 9, 15, 45)}
    if member.fields["type"] != "tensor_ring":
        assert set(found.values()) == {None}
        return
    assert found[45] is not None
    for sites in found.values():
        if sites is not None:
            delta = torch.einsum("oab,lbc,hca->ohl", sites.left, sites.fast, sites.slow).flatten(1)
            torch.testing.assert_close(delta, dense_delta(residual))


@pytest.mark.parametrize(("most", "scale"), [(0.0, 1), (1.0, 1), (0.3, 4), (5.0, 0.25), (2.0, 0.5)])
def test_the_scale_is_a_power_of_two(most: float, scale: float) -> None:
    assert power_of_two(torch.tensor([[0.0, -most]])) == scale
