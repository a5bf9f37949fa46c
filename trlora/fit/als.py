"""Alternating least squares over the parts of an adapter: `W0·T + Δ` is linear in every one of their cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trlora.fit import residuals, transforms
from trlora.fit.problem import Problem
from trlora.layers import LayerAdapter
from trlora.residuals import AbstractResidual

_EXACT = 1e-12
"""An error, relative to the change, that rounding alone explains."""
_LOOK = 5
"""Sweeps between two looks at whether it still pays."""


def has_steps(adapter: LayerAdapter) -> bool:
    """Whether both parts of the adapter have a step, and nothing stands outside of them."""
    return (
        transforms.step_of(adapter.transform) is not None
        and residuals.step_of(adapter.residual) is not None
        and not adapter.outside
    )


def alternate_(
    problem: Problem,
    adapter: LayerAdapter,
    *,
    sweeps: int,
    tolerance: float = 1e-3,
    stopped: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Lower `‖W* − (W0·T + Δ)‖_F` in place, T and Δ by turns.

    Args:
        adapter: one that `has_steps`, its parameters in float64.
        sweeps: at most.
        tolerance: it ends where five sweeps take less than this share off the error.
        stopped: asked before every sweep whether to give up.

    Returns:
        The error relative to the change before and after every sweep; but for rounding it never rises.

    Raises:
        InterruptedError: `stopped` said so.
    """
    step_t, step_r = transforms.step_of(adapter.transform), residuals.step_of(adapter.residual)
    assert step_t is not None
    assert step_r is not None
    scale = problem.change or 1.0
    with torch.no_grad():
        history = [problem.error(adapter) / scale]
        for sweep in range(1, sweeps + 1):
            if stopped():
                raise InterruptedError("the fit was stopped")
            if not adapter.transform.trivial:
                step_t(problem.gram, cross_of(problem, adapter.residual))
            target = left_by_transform(problem, adapter)
            step_r(target)
            rest = target if adapter.residual.trivial else target - adapter.residual.delta()
            history.append(float(torch.linalg.vector_norm(rest)) / scale)
            if history[-1] <= _EXACT:
                break
            if sweep % _LOOK == 0 and history[-1 - _LOOK] - history[-1] <= tolerance * history[-1 - _LOOK]:
                break
    return history


def cross_of(problem: Problem, residual: AbstractResidual) -> Tensor:
    """`W0ᵀ·(W* − Δ)`, without a product of whole weights where Δ is of low rank."""
    if residual.trivial:
        return problem.cross
    left, right = residual.low_rank()
    if 2 * left.shape[1] >= min(problem.base.shape):
        return problem.cross - problem.base.T @ residual.delta()
    return problem.cross - (problem.base.T @ left) @ right.T


def left_by_transform(problem: Problem, adapter: LayerAdapter) -> Tensor:
    """`W* − W0·T`."""
    return problem.tuned - adapter.transform.multiply(problem.base)
