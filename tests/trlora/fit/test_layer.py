"""The laws of a fit, over every registered member, on a rectangular layer."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    IN,
    MAGNITUDES,
    OUT,
    OUTPUT_TRANSFORMS,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    spec_of,
    state_bits,
    trained,
    weight_oracle,
)
from trlora import AdaptedConv2d, AdapterSpec, LayerAdapter, ShapeError
from trlora.errors import FitError
from trlora.fit import FitOptions, LayerFit, Search, fit_curve, fit_layer, ladder
from trlora.fit.grow import grow_

NOTHING = (TRANSFORMS[0], RESIDUALS[0])
LINEAR = {"identity", "none", "diagonal", "block_orthogonal", "tensor_ring", "low_rank", "kronecker"}
"""Members whose fit starts near enough to reach a target of their own family; block-orthogonal ones by Procrustes."""
QUICK = FitOptions(starts=1, trial=5, sweeps=20)
PATIENT = FitOptions(sweeps=1000, tolerance=1e-5)


def weight(seed: int = 5, rows: int = OUT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, IN, generator=generator, dtype=torch.float64) / math.sqrt(IN)


def tuned_by(adapter: LayerAdapter, base: Tensor) -> Tensor:
    return torch.from_numpy(weight_oracle(base, [(adapter, 1.0)]))


def never_rises(fit: LayerFit) -> bool:
    return all(after <= before + 1e-12 for before, after in itertools.pairwise(fit.history))


def error_of(fit: LayerFit, base: Tensor, tuned: Tensor) -> float:
    """`‖W* − W'‖ / ‖W* − W0‖` by the oracle's loops."""
    merged = weight_oracle(base, [(copy.deepcopy(fit.adapter).double(), 1.0)])
    return float(np.linalg.norm(tuned.numpy() - merged) / np.linalg.norm(tuned.numpy() - base.numpy()))


def own(member: Member) -> bool:
    """Whether a target of the member's own family is reached."""
    return member.type in LINEAR and not member.fields.get("neumann_terms")


ALONE = [(t, RESIDUALS[0]) for t in TRANSFORMS[1:]] + [(TRANSFORMS[0], r) for r in RESIDUALS[1:]]
TOGETHER = [(t, r) for t in TRANSFORMS[1:5] for r in (RESIDUALS[1], RESIDUALS[5], RESIDUALS[9])]


def named(pairs: list[tuple[Member, Member]]) -> list[object]:
    return [pytest.param(t, r, id=f"{t}+{r}") for t, r in pairs]


@pytest.mark.parametrize(("transform", "residual"), named([p for p in ALONE + TOGETHER if own(p[0]) and own(p[1])]))
def test_a_target_of_the_family_is_recovered(transform: Member, residual: Member) -> None:
    base = weight()
    tuned = tuned_by(trained(adapter_of(transform, residual), amount=0.1), base)
    fit = fit_layer(base, tuned, spec_of(transform, residual), PATIENT)
    assert fit.history[-1] <= 1e-6
    assert fit.method == ("SVD" if transform.type == "identity" and residual.type == "low_rank" else "ALS")
    assert never_rises(fit)
    assert fit.parameters == transform.parameters + residual.parameters
    assert fit.relative_error <= 1e-5  # rounded to float32
    assert error_of(fit, base, tuned) == pytest.approx(fit.relative_error, abs=1e-9)


@pytest.mark.parametrize(("transform", "residual"), named([p for p in ALONE if not (own(p[0]) and own(p[1]))]))
def test_other_members_come_near_a_target_of_their_family(transform: Member, residual: Member) -> None:
    base = weight()
    tuned = tuned_by(trained(adapter_of(transform, residual), amount=0.1), base)
    fit = fit_layer(base, tuned, spec_of(transform, residual))
    assert never_rises(fit)
    assert fit.relative_error <= (0.3 if residual.type == "hadamard" else 1e-3)


EVERY = [(t, RESIDUALS[5]) for t in TRANSFORMS] + [(TRANSFORMS[2], r) for r in RESIDUALS]


@pytest.mark.parametrize(("transform", "residual"), named(EVERY))
def test_every_member_takes_a_target_of_no_family(transform: Member, residual: Member) -> None:
    base = weight()
    tuned = base + 0.1 * weight(6)
    fit = fit_layer(base, tuned, spec_of(transform, residual), QUICK)
    assert never_rises(fit)
    assert fit.relative_error < 1
    assert error_of(fit, base, tuned) == pytest.approx(fit.relative_error, abs=1e-9)
    assert fit.adapter.spec == spec_of(transform, residual)
    assert fit.adapter.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in fit.adapter.parameters())


@pytest.mark.parametrize("shape", [(OUT, IN), (60, IN)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lora_is_the_optimum_of_eckart_and_young(shape: tuple[int, int], rank: int) -> None:
    base, change = weight(rows=shape[0]), weight(8, rows=shape[0])
    fit = fit_layer(base, base + change, AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": rank}}))
    values = np.linalg.svd(change.numpy(), compute_uv=False)
    assert fit.error == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("rows", [OUT, 60])
def test_a_low_rank_transform_is_reduced_rank_regression(rows: int) -> None:
    base, change = weight(rows=rows), weight(8, rows=rows)
    fit = fit_layer(base, base + change, spec_of(Member({"type": "low_rank", "rank": 3, "alpha": 7.0})))
    reached = base.numpy() @ np.linalg.pinv(base.numpy()) @ change.numpy()
    values = np.linalg.svd(reached, compute_uv=False)
    missed = np.linalg.norm(change.numpy() - reached)
    assert fit.error == pytest.approx(np.sqrt(missed**2 + (values[3:] ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("magnitude", [None, MAGNITUDES[1]], ids=str)
@pytest.mark.parametrize("output", OUTPUT_TRANSFORMS, ids=str)
def test_output_transforms_are_fitted_beside_the_rest(output: Member, magnitude: Member | None) -> None:
    base = weight()
    adapter = adapter_of(None, RESIDUALS[1], magnitude=magnitude, weight=base, output_transform=output)
    tuned = tuned_by(trained(adapter, amount=0.1), base)
    fit = fit_layer(base, tuned, spec_of(None, RESIDUALS[1], magnitude, output), QUICK)
    without = fit_layer(base, tuned, spec_of(None, RESIDUALS[1], magnitude), QUICK)
    assert never_rises(fit)
    assert fit.relative_error < 0.5 * without.relative_error
    assert error_of(fit, base, tuned) == pytest.approx(fit.relative_error, abs=1e-9)


def test_a_diagonal_transform_is_least_squares_column_by_column() -> None:
    base, tuned = weight(), weight(8)
    fit = fit_layer(base, tuned, spec_of(TRANSFORMS[1]))
    expected = [np.linalg.lstsq(base[:, [j]].numpy(), tuned[:, j].numpy(), rcond=None)[0].item() for j in range(IN)]
    np.testing.assert_allclose(fit.adapter.transform.matrix().diagonal().numpy(), expected, rtol=1e-5)


def test_a_kronecker_product_is_the_best_rank_one_of_the_rearranged_weight() -> None:
    base, change = weight(), weight(8)
    fit = fit_layer(base, base + change, spec_of(None, RESIDUALS[8]))
    (a, b), (c, d) = (2, 14), (5, 9)
    rearranged = np.zeros((a * c, b * d))
    for i, j in itertools.product(range(OUT), range(IN)):
        rearranged[(i // b) * c + j // d, (i % b) * d + j % d] = change[i, j]
    values = np.linalg.svd(rearranged, compute_uv=False)
    assert fit.error == pytest.approx(np.sqrt((values[1:] ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("magnitude", MAGNITUDES[1:3], ids=str)
def test_magnitudes_are_fitted_beside_the_rest(magnitude: Member) -> None:
    base = weight()
    tuned = tuned_by(trained(adapter_of(None, RESIDUALS[1], magnitude=magnitude, weight=base), amount=0.1), base)
    fit = fit_layer(base, tuned, spec_of(None, RESIDUALS[1], magnitude))
    plain = fit_layer(base, tuned, spec_of(None, RESIDUALS[1]))
    assert fit.relative_error < 0.02
    assert plain.relative_error > 10 * fit.relative_error
    assert error_of(fit, base, tuned) == pytest.approx(fit.relative_error, abs=1e-9)


@pytest.mark.parametrize("magnitude", MAGNITUDES[1:3], ids=str)
def test_a_magnitude_alone_is_least_squares_row_by_row(magnitude: Member) -> None:
    base, tuned = weight(), weight() + 0.3 * weight(8)
    fit = fit_layer(base, tuned, spec_of(None, None, magnitude))
    left = [
        tuned[i].numpy() - (base[i].numpy() @ tuned[i].numpy()) / (base[i].numpy() @ base[i].numpy()) * base[i].numpy()
        for i in range(OUT)
    ]
    assert fit.error == pytest.approx(np.linalg.norm(left), rel=1e-6)


def test_a_convolutions_weight_is_a_matrix() -> None:
    conv = nn.Conv2d(6, 10, (3, 5), groups=2, dtype=torch.float64).requires_grad_(False)
    spec = spec_of(None, RESIDUALS[1])
    residual = spec.residual.build(45, 10, torch.Generator().manual_seed(1))
    true = LayerAdapter(spec, spec.transform.build(45), trained(residual))
    tuned = torch.from_numpy(weight_oracle(conv.weight.flatten(1), [(true, 1.0)])).view(conv.weight.shape)
    fit = fit_layer(conv.weight, tuned, spec)
    layer = AdaptedConv2d(conv)
    layer.add("fitted", fit.adapter)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    expected = nn.functional.conv2d(x, tuned, conv.bias, groups=2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[6]], ids=str)
@pytest.mark.parametrize("kind", ["low_rank", "tensor_ring"])
def test_more_is_never_worse_along_a_curve(transform: Member, kind: str) -> None:
    base = weight()
    tuned = base + 0.2 * weight(8)
    spec = spec_of(transform, Member({"type": kind}))
    curve = fit_curve(base, tuned, spec, Search(False, True, most=600), QUICK)
    assert len(curve) > 3
    assert [fit.parameters for fit in curve] == sorted({fit.parameters for fit in curve})
    assert all(fit.parameters <= 600 for fit in curve)
    for before, after in itertools.pairwise(curve):
        assert after.error <= before.error * (1 + 1e-6)


def test_a_curve_grows_what_pays_most() -> None:
    base = weight()
    ring = {"type": "tensor_ring", "rank": 3}
    tuned = tuned_by(trained(adapter_of(Member(ring)), amount=0.2), base)
    spec = spec_of(Member({"type": "tensor_ring"}), Member({"type": "low_rank"}))
    curve = fit_curve(base, tuned, spec, Search(True, True, most=900, enough=1e-3), QUICK)
    last = curve[-1].adapter.spec.to_dict()
    assert curve[-1].relative_error < 0.2
    assert last["transform"]["rank"] > 1


@pytest.mark.parametrize(
    ("small", "great"),
    [
        (({"type": "tensor_ring", "rank": 2}, {"type": "none"}), ({"type": "tensor_ring", "rank": 4}, {"type": "none"})),
        (({"type": "low_rank", "rank": 2, "alpha": 3.0}, {"type": "none"}),
         ({"type": "low_rank", "rank": 4, "alpha": 7.0}, {"type": "none"})),
        (({"type": "diagonal"}, {"type": "low_rank", "rank": 2, "alpha": 3.0}),
         ({"type": "diagonal"}, {"type": "low_rank", "rank": 5})),
        (({"type": "identity"}, {"type": "tensor_ring", "rank": [1, 2, 3, 2, 1, 2]}),
         ({"type": "identity"}, {"type": "tensor_ring", "rank": [2, 2, 5, 3, 1, 4]})),
    ],
)  # fmt: skip
def test_grown_adapters_are_the_same_and_can_move(
    small: tuple[dict[str, object], dict[str, object]], great: tuple[dict[str, object], dict[str, object]]
) -> None:
    before, after = (trained(adapter_of(Member(pair[0]), Member(pair[1]))) for pair in (small, great))
    assert grow_(after, before, torch.Generator().manual_seed(0))
    base = weight()
    np.testing.assert_allclose(weight_oracle(base, [(after, 1.0)]), weight_oracle(base, [(before, 1.0)]), atol=1e-12)
    tuned = tuned_by(before, base) + weight(9)
    kept = torch.linalg.vector_norm(tuned - tuned_by(before, base))
    fit = fit_layer(base, tuned, after.spec, FitOptions(starts=1, sweeps=20), begin=after)
    alone = fit_layer(base, tuned, before.spec, FitOptions(starts=1, sweeps=20), begin=before)
    assert fit.error < alone.error < kept
    assert not grow_(before, after, torch.Generator().manual_seed(0))


def test_ladders_have_the_sizes_that_a_layer_takes() -> None:
    blocks = ladder(spec_of(TRANSFORMS[2]).transform, lambda spec: spec.build(IN), 10**6)
    assert [spec.to_dict()["block_size"] for spec in blocks] == [3, 5]
    reflections = ladder(spec_of(TRANSFORMS[10]).transform, lambda spec: spec.build(IN), 10 * IN)
    assert [spec.to_dict()["rank"] for spec in reflections] == [2, 4, 6, 8, 10]
    products = ladder(spec_of(None, RESIDUALS[8]).residual, lambda spec: spec.build(IN, OUT), 10**6)
    assert [spec.to_dict()["rank"] for spec in products] == [1, 2, 3, 4, 5, None]
    assert len(ladder(spec_of(TRANSFORMS[1]).transform, lambda spec: spec.build(IN), 10**6)) == 1


def test_the_same_arguments_give_the_same_bits_and_leave_the_generator_alone() -> None:
    base, tuned = weight(), weight(8)
    spec = spec_of(TRANSFORMS[6], RESIDUALS[5])
    state = torch.get_rng_state()
    first = fit_layer(base, tuned, spec, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    second = fit_layer(base, tuned, spec, QUICK)
    assert state_bits(first.adapter) == state_bits(second.adapter)


def test_what_cannot_be_fitted_is_refused() -> None:
    base, spec = weight(), spec_of(None, RESIDUALS[1])
    with pytest.raises(ShapeError, match=r"\(28, 45\) and \(45, 28\)"):
        fit_layer(base, base.T, spec)
    broken = weight(8)
    broken[3, 4] = math.nan
    with pytest.raises(FitError, match="1 of 1260 values of the fine-tuned weight are NaN"):
        fit_layer(base, broken, spec)
    with pytest.raises(FitError, match="no parameters"):
        fit_layer(base, weight(8), spec_of(*NOTHING))
    with pytest.raises(FitError, match="dtype torch.int64"):
        fit_layer(base, torch.ones(OUT, IN, dtype=torch.int64), spec)
    with pytest.raises(FitError, match="bias"):
        fit_layer(base, weight(8), spec_of(None, RESIDUALS[1], MAGNITUDES[3]))
    with pytest.raises(FitError, match="more than 3 parameters"):
        fit_curve(base, weight(8), spec, Search(False, True, most=3))


@pytest.mark.parametrize("transform", [TRANSFORMS[6], TRANSFORMS[10]], ids=str)
def test_a_fit_can_be_stopped(transform: Member) -> None:
    asked = iter([False, True])
    with pytest.raises(InterruptedError):
        fit_layer(weight(), weight(8), spec_of(transform), stopped=lambda: next(asked))


def test_nothing_to_do_is_done_exactly() -> None:
    fit = fit_layer(weight(), weight(), spec_of(None, RESIDUALS[1]))
    assert fit.error == 0
    assert fit.relative_error == 0
