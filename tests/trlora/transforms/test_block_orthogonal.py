from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import OFTConfig, get_peft_model
from torch import nn

from tests.helpers import cayley_oracle
from trlora import AdaptedLinear, AdapterSpec, CheckpointError, LayerAdapter, SpecError
from trlora.transforms import BlockOrthogonalTransform, BlockOrthogonalTransformSpec


@pytest.mark.parametrize(("blocks", "size"), [(1, 6), (5, 3), (3, 5), (4, 2), (7, 1)])
def test_the_blocks_are_cayley_maps_of_the_skew_matrices(blocks: int, size: int) -> None:
    skew = torch.randn(blocks, size * (size - 1) // 2, dtype=torch.float64)
    matrix = BlockOrthogonalTransform(skew, size).matrix().detach().numpy()
    expected = np.zeros((blocks * size, blocks * size))
    for n in range(blocks):
        q, entries = np.zeros((size, size)), iter(skew[n].tolist())
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(entries)
                q[j, i] = -q[i, j]
        expected[n * size : (n + 1) * size, n * size : (n + 1) * size] = cayley_oracle(q)
    np.testing.assert_allclose(matrix, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(blocks * size), rtol=0, atol=1e-11)
    assert np.linalg.det(matrix) == pytest.approx(1)  # rotations, no reflections


@pytest.mark.parametrize(("features", "outputs", "block"), [(15, 7, 3), (15, 28, 5), (24, 9, 4)])
def test_pefts_oft_has_the_same_outputs_and_the_same_merged_weight(features: int, outputs: int, block: int) -> None:
    base = nn.Linear(features, outputs, dtype=torch.float64)
    layer = AdaptedLinear(nn.Linear(features, outputs, dtype=torch.float64))
    layer.base.load_state_dict(base.state_dict())
    config = OFTConfig(oft_block_size=block, target_modules=["0"], use_cayley_neumann=False)
    peft = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    ((_, skew),) = [item for item in peft.named_parameters() if "oft_R" in item[0]]
    with torch.no_grad():
        skew.copy_(0.5 * torch.randn_like(skew))
    spec = AdapterSpec.from_dict({"transform": {"type": "block_orthogonal", "block_size": block}})
    transform = BlockOrthogonalTransform(skew.detach().clone(), block)
    layer.add("oft", LayerAdapter.from_parts(spec, transform, None, features, outputs))

    x = torch.randn(2, 3, features, dtype=torch.float64)
    expected = peft(x)
    assert not torch.allclose(expected, layer.base(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # PEFT's identity is float32
    merged = peft.merge_and_unload()[0].weight  # type: ignore[operator]
    torch.testing.assert_close(layer.merged_weight(torch.float64), merged, rtol=1e-6, atol=1e-6, check_stride=False)


def test_a_block_size_that_does_not_divide_names_the_nearest_that_does() -> None:
    with pytest.raises(SpecError, match="8 does not divide 45 features; 9 does"):
        BlockOrthogonalTransformSpec(8).build(45)


@pytest.mark.parametrize("entries", [2, 4, 5, 7])
def test_entries_that_fill_no_triangle_are_refused(entries: int) -> None:
    with pytest.raises(CheckpointError, match=f"{entries} entries"):
        BlockOrthogonalTransformSpec(3).from_tensors({"skew": torch.zeros(5, entries)})


def test_the_penalties_know_that_it_is_orthogonal() -> None:
    skew = torch.randn(5, 3, dtype=torch.float64)
    transform = BlockOrthogonalTransform(skew, 3)
    assert transform.orthogonal_penalty().item() == 0
    distance = np.linalg.norm(transform.matrix().detach().numpy() - np.eye(15))
    assert transform.identity_penalty().item() == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_pefts_oft_with_a_neumann_series_and_with_a_shared_block(terms: int, shared: bool) -> None:
    """Their series is that of the transposed rotation, so the skew changes its sign."""
    base = nn.Linear(24, 9, dtype=torch.float64)
    layer = AdaptedLinear(copy.deepcopy(base))
    config = OFTConfig(
        oft_block_size=4,
        target_modules=["0"],
        use_cayley_neumann=True,
        num_cayley_neumann_terms=terms,
        block_share=shared,
    )
    peft = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    ((_, skew),) = [item for item in peft.named_parameters() if "oft_R" in item[0]]
    with torch.no_grad():
        skew.copy_(0.3 * torch.randn_like(skew))
    fields = {"type": "block_orthogonal", "block_size": 4, "neumann_terms": terms, "shared": shared}
    spec = AdapterSpec.from_dict({"transform": fields})
    transform = spec.transform.from_tensors({"skew": -skew.detach()})
    assert transform is not None
    layer.add("oft", LayerAdapter.from_parts(spec, transform.fitted(24, 24), None, 24, 9))
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peft(x), rtol=1e-12, atol=1e-12)
    merged = peft.merge_and_unload()[0].weight  # type: ignore[operator]
    torch.testing.assert_close(layer.merged_weight(torch.float64), merged, rtol=1e-12, atol=1e-12, check_stride=False)


def test_a_series_is_only_nearly_orthogonal() -> None:
    skew = 0.3 * torch.randn(3, 6, dtype=torch.float64)
    transform = BlockOrthogonalTransform(skew, 4, neumann_terms=5)
    matrix = transform.matrix().detach().numpy()
    assert transform.orthogonal_penalty().item() == pytest.approx(np.linalg.norm(matrix @ matrix.T - np.eye(12)))


def test_a_shared_block_fits_every_layer_that_it_divides() -> None:
    transform = BlockOrthogonalTransformSpec(4, shared=True).from_tensors({"skew": torch.randn(1, 6)})
    fitted = transform.fitted(20, 20)
    assert fitted is not None
    assert fitted.matrix().shape == (20, 20)
    torch.testing.assert_close(fitted.matrix()[16:, 16:], fitted.matrix()[:4, :4])
    assert transform.fitted(18, 18) is None
    with pytest.raises(CheckpointError, match="expected one"):
        BlockOrthogonalTransformSpec(4, shared=True).from_tensors({"skew": torch.randn(2, 6)})
