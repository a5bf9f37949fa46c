from __future__ import annotations

import numpy as np
import pytest
import torch

from trlora.transforms import DiagonalTransform

SCALE = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)


def test_every_feature_is_scaled() -> None:
    assert DiagonalTransform(SCALE)(torch.ones(2, 3, 5, dtype=torch.float64))[1, 2].tolist() == SCALE.tolist()


def test_the_penalties_are_distances_of_t_and_of_its_gram_matrix() -> None:
    transform = DiagonalTransform(SCALE.clone())
    matrix = np.diag(SCALE.numpy())
    assert transform.identity_penalty().item() == pytest.approx(np.linalg.norm(matrix - np.eye(5)))
    assert transform.orthogonal_penalty().item() == pytest.approx(np.linalg.norm(matrix @ matrix.T - np.eye(5)))


def test_signs_are_orthogonal_and_not_the_identity() -> None:
    transform = DiagonalTransform(torch.tensor([1.0, -1.0, 1.0]))
    assert transform.orthogonal_penalty().item() == 0
    assert transform.identity_penalty().item() == 2
