from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import (
    SQUARE_RINGS,
    LargestTensor,
    distance_oracle,
    matrix_oracle,
    product_oracle,
    random_matrix_ring,
    random_orthogonal,
)
from trlora import ShapeError
from trlora.ring import (
    identity_cores,
    identity_penalty,
    literal_orthogonal_penalty,
    orthogonal_penalty,
    product_cores,
)

EXACT = [((7,), (4,)), ((3, 5), (2, 2)), ((3, 5, 2), (2, 2, 2)), ((3, 1, 5), (2, 8, 2)), ((3, 2, 1, 3), (1, 1, 1, 1))]
BOTH = [identity_penalty, orthogonal_penalty]
ALL = [*BOTH, literal_orthogonal_penalty]


def closed(ranks: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(ranks, [*ranks[1:], ranks[0]], strict=True))


def kronecker(modes: Sequence[int], rank: int) -> tuple[list[Tensor], np.ndarray]:
    """`A^d = O_d / R` for random orthogonal O_d, and the matrix that it is."""
    factors = [random_orthogonal(mode) for mode in modes]
    cores = [(factor / rank)[:, :, None, None].repeat(1, 1, rank, rank) for factor in factors]
    matrix = np.ones((1, 1))
    for factor in factors:
        matrix = np.kron(factor.numpy(), matrix)
    return cores, matrix


@pytest.mark.parametrize(("modes", "ranks"), SQUARE_RINGS)
def test_the_identity_penalty_is_its_formula(modes: Sequence[int], ranks: Sequence[int]) -> None:
    cores = random_matrix_ring(modes, modes, ranks)
    targets = [np.full((r, s), 1 / math.sqrt(r * s)) for r, s in closed(ranks)]
    expected = distance_oracle([core.numpy() for core in cores], targets)
    assert identity_penalty(cores).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("modes", "ranks"), SQUARE_RINGS)
def test_the_orthogonal_penalty_is_the_distance_of_the_gram_cores_from_the_identitys(
    modes: Sequence[int], ranks: Sequence[int]
) -> None:
    cores = random_matrix_ring(modes, modes, ranks)
    targets = [np.full((r * r, s * s), 1 / (r * s)) for r, s in closed(ranks)]
    # the target is a ring of the identity, so a zero of the penalty is T·Tᵀ = I
    ring = [torch.from_numpy(np.einsum("ij,rs->ijrs", np.eye(m), t)) for m, t in zip(modes, targets, strict=True)]
    np.testing.assert_allclose(matrix_oracle(ring), np.eye(math.prod(modes)), rtol=0, atol=1e-12)
    expected = distance_oracle(product_oracle(cores, cores), targets)
    assert orthogonal_penalty(cores).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("modes", "rank"), [((7,), 3), ((3, 5), 2), ((3, 5, 2), 2), ((3, 2, 1, 3), 3)])
def test_the_literal_penalty_is_the_formula_as_printed(modes: Sequence[int], rank: int) -> None:
    cores = random_matrix_ring(modes, modes, [rank] * len(modes))
    expected = distance_oracle(product_oracle(cores, cores), [np.eye(rank * rank) / rank] * len(modes))
    assert literal_orthogonal_penalty(cores).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("penalty", BOTH)
@pytest.mark.parametrize(("modes", "ranks"), EXACT)
def test_the_start_is_exactly_zero_with_a_zero_gradient(
    penalty: Callable[[Sequence[Tensor]], Tensor], modes: Sequence[int], ranks: Sequence[int]
) -> None:
    cores = [core.requires_grad_() for core in identity_cores(modes, ranks)]
    value = penalty(cores)
    assert value.shape == ()
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, cores):
        assert not gradient.any()  # nor NaN, which is true


@pytest.mark.parametrize(("modes", "rank"), [((7,), 3), ((3, 5), 2), ((3, 5, 2), 2), ((3, 1, 2, 5), 3)])
def test_kronecker_products_of_orthogonal_matrices_are_zeros(modes: Sequence[int], rank: int) -> None:
    cores, matrix = kronecker(modes, rank)
    np.testing.assert_allclose(matrix_oracle(cores), matrix, rtol=0, atol=1e-12)
    assert orthogonal_penalty(cores).item() == pytest.approx(0, abs=1e-12 * rank**4 * len(modes))
    assert identity_penalty(cores).item() > 1


def test_descending_to_a_zero_leads_to_an_orthogonal_matrix() -> None:
    """Polyak's step, for a function whose least value is zero, from a random place near the identity."""
    start = identity_cores((3, 4), (2, 2), dtype=torch.float64)
    cores = [(core + 0.1 * torch.randn_like(core)).requires_grad_() for core in start]

    def defect() -> float:
        matrix = matrix_oracle(cores)
        return float(np.abs(matrix @ matrix.T - np.eye(12)).max())

    assert defect() > 0.1
    for _ in range(1000):
        value = orthogonal_penalty(cores)
        if value.item() < 1e-7:
            break
        gradients = torch.autograd.grad(value, cores)
        step = value.item() / sum(g.square().sum().item() for g in gradients)
        with torch.no_grad():
            for core, gradient in zip(cores, gradients, strict=True):
                core -= step * gradient
    assert orthogonal_penalty(cores).item() < 1e-7
    assert defect() < 1e-7
    assert identity_penalty(cores).item() > 0.1  # free to turn: not the identity


def test_the_literal_penalty_is_not_zero_at_the_start() -> None:
    start = identity_cores((3, 5, 2), (2, 2, 2), dtype=torch.float64)
    assert literal_orthogonal_penalty(start).item() > 1
    assert orthogonal_penalty(start).item() == 0


@pytest.mark.parametrize(("modes", "rank"), [((7,), 2), ((3, 5), 2), ((3, 5, 2), 2), ((3, 5, 2), 3), ((3, 1, 2, 5), 2)])
def test_a_zero_of_the_literal_penalty_is_a_scaled_orthogonal_matrix(modes: Sequence[int], rank: int) -> None:
    """`A^d = O_d ⊗ I_R/√R`: its Gram cores are `I_{R²}/R`, and `T·Tᵀ = R^{2−D}·I`."""
    eye = torch.eye(rank, dtype=torch.float64) / math.sqrt(rank)
    cores = [torch.einsum("ij,rs->ijrs", random_orthogonal(mode), eye) for mode in modes]
    assert literal_orthogonal_penalty(cores).item() == pytest.approx(0, abs=1e-11)
    matrix = matrix_oracle(cores)
    scale = float(rank) ** (2 - len(modes))
    np.testing.assert_allclose(matrix @ matrix.T, scale * np.eye(len(matrix)), rtol=0, atol=1e-12)


def test_at_rank_one_both_orthogonal_formulas_are_the_same() -> None:
    cores = random_matrix_ring((3, 5, 2), (3, 5, 2), (1, 1, 1))
    assert literal_orthogonal_penalty(cores).item() == pytest.approx(orthogonal_penalty(cores).item(), rel=1e-14)


@pytest.mark.parametrize("penalty", ALL)
def test_penalties_never_form_the_matrix(penalty: Callable[[Sequence[Tensor]], Tensor]) -> None:
    cores = random_matrix_ring((8, 10, 16), (8, 10, 16), (2, 2, 2))
    with LargestTensor() as largest, FlopCounterMode(display=False) as flops:
        penalty(cores)
    assert largest.entries <= 16 * 16 * 2**4  # the largest Gram core
    assert flops.get_total_flops() <= 2 * sum(m**3 for m in (8, 10, 16)) * 2**4


@pytest.mark.parametrize("penalty", ALL)
def test_penalties_have_gradients_away_from_their_zeros(penalty: Callable[[Sequence[Tensor]], Tensor]) -> None:
    cores = [core.requires_grad_() for core in random_matrix_ring((2, 3), (2, 3), (2, 2))]
    assert torch.autograd.gradcheck(lambda *c: penalty(c), cores)


@pytest.mark.parametrize("penalty", [identity_penalty])
def test_a_ring_that_is_not_square_has_no_identity(penalty: Callable[[Sequence[Tensor]], Tensor]) -> None:
    with pytest.raises(ShapeError, match=r"core 1.*5.*7"):
        penalty(random_matrix_ring((3, 5), (3, 7), (2, 2)))


def test_the_literal_formula_needs_one_rank() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3\]"):
        literal_orthogonal_penalty(random_matrix_ring((3, 5), (3, 5), (2, 3)))


def test_the_gram_cores_are_those_of_t_times_its_transpose() -> None:
    cores = random_matrix_ring((3, 5, 2), (3, 5, 2), (2, 1, 3))
    matrix = matrix_oracle(cores)
    np.testing.assert_allclose(matrix_oracle(product_cores(cores, cores)), matrix @ matrix.T, rtol=1e-10, atol=1e-10)
