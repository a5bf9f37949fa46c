"""Where the fit of a layer begins: at several places where the answer depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trlora.fit import residuals, transforms
from trlora.fit.als import cross_of, left_by_transform
from trlora.fit.lbfgs import minimise_
from trlora.fit.problem import Problem
from trlora.layers import LayerAdapter
from trlora.residuals import HadamardResidual, TensorRingResidual
from trlora.spec import AdapterSpec
from trlora.transforms import TensorRingTransform

_ALONE = 40
"""Iterations of L-BFGS for a transform that is fitted by itself first."""


def starts_of(problem: Problem, spec: AdapterSpec, seed: int, count: int) -> Iterator[LayerAdapter]:
    """Adapters without a magnitude, in float64: the transform solved for first and the residual for what is left; the other
    way round; then at random.

    One is all where they would be the same: where every member has an optimum that does not depend on the start.
    """
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        outputs, inputs = problem.base.shape
        adapter = LayerAdapter.from_spec(spec, inputs, outputs, generator).double().requires_grad_(False)
        transform, residual = adapter.transform, adapter.residual
        both = not (transform.trivial or residual.trivial)
        if number > 1 - both and not _depends_on_start(adapter):
            return
        if number == 0:
            _solve_transform_(problem, adapter, generator)
        else:
            transforms.near_identity_(transform, generator)
        if residuals.step_of(residual) is not None:
            target = left_by_transform(problem, adapter)
            residuals.solve_(residual, target, generator)
            if number > 1:
                residuals.scatter_(residual, target, generator)
        yield adapter.requires_grad_(True)


def _solve_transform_(problem: Problem, adapter: LayerAdapter, generator: torch.Generator) -> None:
    """As if the residual, which is zero at its start, were not there."""
    if adapter.transform.trivial:
        return
    if transforms.step_of(adapter.transform) is not None:
        transforms.solve_(adapter.transform, problem.gram, cross_of(problem, adapter.residual), generator)
    else:
        parameters = list(adapter.transform.requires_grad_(True).parameters())
        minimise_(problem, adapter, parameters, iterations=_ALONE)
        adapter.transform.requires_grad_(False)


def _depends_on_start(adapter: LayerAdapter) -> bool:
    return (
        isinstance(adapter.transform, TensorRingTransform)
        or isinstance(adapter.residual, (TensorRingResidual, HadamardResidual))
        or transforms.step_of(adapter.transform) is None
        or residuals.step_of(adapter.residual) is None
    )
