from __future__ import annotations

import numpy as np
import pytest
import torch

from trlora import CheckpointError, SpecError
from trlora.transforms import HouseholderTransform, HouseholderTransformSpec


@pytest.mark.parametrize(("rank", "features"), [(1, 5), (2, 15), (3, 7), (8, 21)])
def test_it_is_the_product_of_its_reflections(rank: int, features: int) -> None:
    vectors = torch.randn(rank, features, dtype=torch.float64)
    expected = np.eye(features)
    for v in vectors.numpy():
        expected = expected @ (np.eye(features) - 2 * np.outer(v, v) / (v @ v))
    matrix = HouseholderTransform(vectors).matrix().detach().numpy()
    np.testing.assert_allclose(matrix, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(features), rtol=0, atol=1e-11)


def test_the_length_of_a_vector_changes_nothing() -> None:
    vectors = torch.randn(3, 9, dtype=torch.float64)
    scaled = vectors * torch.tensor([[3.0], [-0.1], [1e-4]])
    torch.testing.assert_close(HouseholderTransform(scaled).matrix(), HouseholderTransform(vectors).matrix())


def test_half_precision_is_computed() -> None:
    vectors = torch.randn(4, 9)
    found = HouseholderTransform(vectors.half()).matrix()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), HouseholderTransform(vectors).matrix(), rtol=0, atol=5e-3)


def test_an_odd_number_of_reflections_has_no_identity_to_start_from() -> None:
    with pytest.raises(SpecError, match="even"):
        HouseholderTransformSpec(3).build(15)
    assert HouseholderTransformSpec(3).from_tensors({"vectors": torch.randn(3, 15)}).features == 15


def test_a_vector_of_zeros_is_refused() -> None:
    vectors = torch.randn(3, 15)
    vectors[1] = 0
    with pytest.raises(CheckpointError, match="number 1 is zero"):
        HouseholderTransformSpec(3).from_tensors({"vectors": vectors})
