"""L-BFGS on the members' own parameters: what fits any adapter, linear in its parameters or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trlora.fit.problem import Problem
from trlora.layers import LayerAdapter

_ROUND = 20
"""Iterations between two looks at whether it still pays."""


def minimise_(
    problem: Problem,
    adapter: LayerAdapter,
    parameters: list[nn.Parameter] | None = None,
    *,
    iterations: int = 200,
    tolerance: float = 1e-3,
    stopped: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Lower `‖W* − W'‖_F` over parameters of the adapter, in place; what it leaves is the best it has seen.

    Args:
        parameters: which; all of the adapter's where not given.
        iterations: at most.
        tolerance: it ends where twenty iterations take less than this share off the error.
        stopped: asked before every twenty iterations whether to give up.

    Returns:
        The error relative to the change, before and after every twenty iterations; it never rises.

    Raises:
        InterruptedError: `stopped` said so.
    """
    chosen = list(adapter.parameters()) if parameters is None else parameters
    scale = problem.change or 1.0
    history = [problem.error(adapter) / scale]
    optimizer = torch.optim.LBFGS(
        chosen,
        max_iter=_ROUND,
        history_size=_ROUND,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = (problem.rest(adapter) / scale).square().sum()
        loss.backward()
        return loss

    for _ in range(0, iterations, _ROUND):
        if stopped():
            raise InterruptedError("the fit was stopped")
        before = [parameter.detach().clone() for parameter in chosen]
        optimizer.step(closure)
        with torch.no_grad():
            error = problem.error(adapter) / scale
            if not error <= history[-1]:  # a line search that failed
                for parameter, value in zip(chosen, before, strict=True):
                    parameter.copy_(value)
                break
        history.append(error)
        if history[-2] - error <= tolerance * history[-2]:
            break
    for parameter in chosen:
        parameter.grad = None
    return history
