"""Magnitudes: the gain of every row, fitted beside what is inside it."""

from __future__ import annotations

import torch
from torch import Tensor

from trlora.errors import FitError
from trlora.fit.lbfgs import minimise_
from trlora.fit.problem import Problem
from trlora.layers import LayerAdapter
from trlora.magnitudes import NormMagnitude, NormMagnitudeSpec, ScaleMagnitude, ScaleMagnitudeSpec
from trlora.spec import AdapterSpec


def with_magnitude(
    problem: Problem, inner: LayerAdapter, spec: AdapterSpec, *, iterations: int, tolerance: float
) -> tuple[LayerAdapter, list[float]]:
    """The adapter of `spec` that goes on from one without a magnitude, by L-BFGS, and the errors on the way.

    A norm is fitted as the gain that it amounts to, for its own gradient leaves out a part on purpose.

    Raises:
        FitError: a magnitude that scales the bias as well, of which a weight says nothing.
    """
    kind = spec.magnitude
    if isinstance(kind, ScaleMagnitudeSpec) and kind.bias:
        raise FitError("a magnitude with bias true scales the layer's bias, which a fit does not see; leave it false")
    if not isinstance(kind, (ScaleMagnitudeSpec, NormMagnitudeSpec)):
        member = kind.build(inner.out_features, problem.base).double()
        adapter = LayerAdapter(spec, inner.transform, inner.residual, member, inner.output_transform)
        return adapter, minimise_(problem, adapter, iterations=iterations, tolerance=tolerance)
    gain = ScaleMagnitude(_best_gain(problem, _whole(problem, inner)), bias=False)
    free = LayerAdapter(spec, inner.transform, inner.residual, gain, inner.output_transform)
    history = minimise_(problem, free, iterations=iterations, tolerance=tolerance)
    with torch.no_grad():
        whole = _whole(problem, inner)
        gain.scale.copy_(_best_gain(problem, whole))
        history.append(problem.error(free) / (problem.change or 1.0))
        if isinstance(kind, NormMagnitudeSpec):
            member = NormMagnitude(gain.scale * torch.linalg.vector_norm(whole, dim=1))
            return LayerAdapter(spec, inner.transform, inner.residual, member, inner.output_transform), history
    return free, history


def _whole(problem: Problem, inner: LayerAdapter) -> Tensor:
    """`Uᵀ·W0·T + Δ`."""
    with torch.no_grad():
        change = inner.change(problem.base)
        return problem.base if change is None else problem.base + change


def _best_gain(problem: Problem, whole: Tensor) -> Tensor:
    """Row by row, the multiple that comes nearest; one for a row of zeros."""
    size = whole.square().sum(1)
    return torch.where(size > 0, (whole * problem.tuned).sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)
