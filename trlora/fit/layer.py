"""One layer's adapter, fitted: from several starts, by alternating least squares, or by L-BFGS where those do not go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trlora.errors import FitError
from trlora.fit import residuals
from trlora.fit.als import alternate_, has_steps, left_by_transform
from trlora.fit.gain import with_magnitude
from trlora.fit.lbfgs import minimise_
from trlora.fit.problem import Problem
from trlora.fit.starts import starts_of
from trlora.layers import LayerAdapter
from trlora.magnitudes import NoMagnitudeSpec
from trlora.residuals import LowRankResidual
from trlora.spec import AdapterSpec


@final
@dataclass(frozen=True)
class FitOptions:
    """How hard to try. The same options give the same bits."""

    seed: int = 0
    """Of the starts that are random."""
    starts: int = 3
    """How many to try where the answer depends on them, as it does for tensor rings."""
    trial: int = 15
    """Sweeps after which the best of the starts goes on alone."""
    sweeps: int = 200
    """Of alternating least squares, or iterations of L-BFGS, at most."""
    tolerance: float = 1e-3
    """The share of the error that five sweeps, or twenty iterations, must take off for it to go on."""


@final
@dataclass(frozen=True)
class LayerFit:
    """An adapter fitted to one layer."""

    adapter: LayerAdapter
    """Its parameters in float32, as checkpoints have them."""
    error: float
    """`‖W* − W'‖_F` of that adapter, computed in float64."""
    change: float
    """`‖W* − W0‖_F`: the error of no adapter at all."""
    method: str
    """`SVD` (the optimum), `ALS`, `L-BFGS`, or several of them."""
    history: tuple[float, ...]
    """The error relative to the change on the way, in float64; but for rounding it never rises."""

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.adapter.parameters())

    @property
    def relative_error(self) -> float:
        """`error / change`: 0 where all of the change is in the adapter, 1 where nothing of it is."""
        return self.error / self.change if self.change else 0.0


def fit_layer(
    base: Tensor,
    tuned: Tensor,
    spec: AdapterSpec,
    options: FitOptions | None = None,
    *,
    begin: LayerAdapter | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> LayerFit:
    """Find an adapter of `spec` with `‖W* − diag(gain)·(Uᵀ·W0·T + Δ)‖_F` small.

    Args:
        base: W0, (out, in), or of a convolution (out, in/groups, height, width).
        tuned: W*, of the same shape.
        spec: of any registered members; those without a method of their own are fitted by L-BFGS.
        begin: an adapter of this spec without a magnitude to begin from as well; the result is no worse than it.
        stopped: asked now and then whether to give up.

    Raises:
        ShapeError: the weights' shapes differ.
        FitError: NaN or Inf, nothing that could be fitted, or a magnitude that scales biases.
        SpecError: the adapter cannot be built for this layer.
        InterruptedError: `stopped` said so.
    """
    options = options or FitOptions()
    problem = Problem.of(base, tuned)
    plain = isinstance(spec.magnitude, NoMagnitudeSpec)
    inner = replace(spec, magnitude=NoMagnitudeSpec())

    best: tuple[LayerAdapter, list[float]] | None = None
    begun = [] if begin is None else [copy.deepcopy(begin).double()]
    for start in (*begun, *starts_of(problem, inner, options.seed, options.starts)):
        history = _improve_(problem, start, options.trial, options.tolerance, stopped)
        if best is None or history[-1] < best[1][-1]:
            best = (start, history)
    assert best is not None
    adapter, history = best
    methods = ["SVD" if _is_optimum(adapter) else "ALS" if has_steps(adapter) else "L-BFGS"]
    if not list(adapter.parameters()):
        if plain:
            raise FitError("transform 'identity' and residual 'none' have no parameters to fit")
        methods = []
    else:
        history += _improve_(problem, adapter, options.sweeps, options.tolerance, stopped)[1:]
        history += _finish_(problem, adapter)
    if not plain:
        methods.append("L-BFGS")
        adapter, more = with_magnitude(problem, adapter, spec, iterations=options.sweeps, tolerance=options.tolerance)
        history += more
    adapter = adapter.float().requires_grad_(False)
    return LayerFit(adapter, problem.error(adapter), problem.change, " + ".join(dict.fromkeys(methods)), tuple(history))


def _improve_(
    problem: Problem, adapter: LayerAdapter, count: int, tolerance: float, stopped: Callable[[], bool]
) -> list[float]:
    if _is_optimum(adapter):
        return [problem.error(adapter) / (problem.change or 1.0)]
    if has_steps(adapter):
        return alternate_(problem, adapter, sweeps=count, tolerance=tolerance, stopped=stopped)
    return minimise_(problem, adapter, iterations=count, tolerance=tolerance, stopped=stopped)


def _is_optimum(adapter: LayerAdapter) -> bool:
    """Whether `solve_` has found the optimum of all of it."""
    return adapter.transform.trivial and not adapter.outside and isinstance(adapter.residual, LowRankResidual)


def _finish_(problem: Problem, adapter: LayerAdapter) -> list[float]:
    """The optimum of a low-rank residual for the transform that was found, which sweeps only come near to."""
    if _is_optimum(adapter) or adapter.outside or not isinstance(adapter.residual, LowRankResidual):
        return []
    with torch.no_grad():
        residuals.solve_(adapter.residual, left_by_transform(problem, adapter), torch.Generator())
        return [problem.error(adapter) / (problem.change or 1.0)]
