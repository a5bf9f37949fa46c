from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import SQUARE_RINGS, LargestTensor, matrix_oracle, random_matrix_ring
from trlora import CheckpointError, ShapeError, ring
from trlora.transforms import TensorRingTransform, TensorRingTransformSpec


@pytest.mark.parametrize(("modes", "ranks"), SQUARE_RINGS)
def test_it_is_the_ring_of_its_cores(modes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    cores = random_matrix_ring(modes, modes, ranks)
    transform = TensorRingTransform(cores)
    assert transform.features == np.prod(modes)
    np.testing.assert_allclose(transform.matrix().detach().numpy(), matrix_oracle(cores), rtol=1e-11, atol=1e-11)
    assert transform.identity_penalty().item() == ring.identity_penalty(cores).item()
    assert transform.orthogonal_penalty().item() == ring.orthogonal_penalty(cores).item()
    assert list(transform.state_dict()) == [f"core.{d}" for d in range(len(modes))]


def test_it_never_forms_its_matrix() -> None:
    transform = TensorRingTransformSpec().build(1280)
    with LargestTensor() as largest:
        transform(torch.randn(1, 1280))
        transform.identity_penalty()
        transform.orthogonal_penalty()
    assert largest.entries < 1280 * 1280 // 100


def test_cores_must_be_square() -> None:
    with pytest.raises(ShapeError, match=r"core\.1.*4.*5"):
        TensorRingTransform(random_matrix_ring((3, 4), (3, 5), (2, 2)))


def test_modes_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 4\).*12.*45"):
        TensorRingTransformSpec(order=2, modes=(3, 4)).build(45)


def test_its_tensors_are_taken_out() -> None:
    cores = random_matrix_ring((3, 5, 2), (3, 5, 2), (2, 3, 1))
    tensors = {**{f"core.{d}": core for d, core in enumerate(cores)}, "other": torch.zeros(1)}
    member = TensorRingTransformSpec(order=3, rank=(2, 3, 1), modes=(3, 5, 2)).from_tensors(tensors)
    assert list(tensors) == ["other"]
    assert all(torch.equal(one, other) for one, other in zip(member.core, cores, strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorRingTransformSpec(rank=(2, 3, 2)), r"rank.*\(2, 3, 2\).*\[2, 3, 1\]"),
        (TensorRingTransformSpec(rank=(2, 3, 1), modes=(5, 3, 2)), r"modes.*\[5, 3, 2\].*\[3, 5, 2\].*null"),
        (TensorRingTransformSpec(rank=(2, 3, 1, 1), order=4), r"core\.3.*missing"),
    ],
)
def test_a_spec_that_contradicts_the_tensors_is_refused(spec: TensorRingTransformSpec, message: str) -> None:
    cores = random_matrix_ring((3, 5, 2), (3, 5, 2), (2, 3, 1))
    with pytest.raises(CheckpointError, match=message):
        spec.from_tensors({f"core.{d}": core for d, core in enumerate(cores)})
