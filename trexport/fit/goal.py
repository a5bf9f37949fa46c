"""What a fit is asked for, what it did, and what it takes at the least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from trexport.errors import TrexportError
from trexport.fit.plan import FitPlan
from trlora import AdapterSpec, LayerAdapter
from trlora.errors import TrloraError
from trlora.fit import ladder


@final
@dataclass(frozen=True)
class FitGoal:
    """What is asked for."""

    spec: AdapterSpec
    choose_transform: bool = False
    """Whether the transform's size may be chosen, layer by layer, where there is a budget or an error to keep."""
    choose_residual: bool = False
    budget: int | None = None
    """Parameters at most, over all layers."""
    max_error: float | None = None
    """`‖W* − W'‖_F / ‖W* − W0‖_F` at most, over all targets."""

    @property
    def searches(self) -> bool:
        """Whether something is left to choose by."""
        return self.budget is not None or self.max_error is not None

    @property
    def free_transform(self) -> bool:
        return self.choose_transform and self.searches

    @property
    def free_residual(self) -> bool:
        return self.choose_residual and self.searches


@final
@dataclass(frozen=True)
class FittedLayer:
    """What became of one layer."""

    path: str
    spec: AdapterSpec | None
    """None for a layer that got no adapter, its parameters being worth more elsewhere."""
    parameters: int
    error: float
    """`‖W* − W'‖_F`."""
    change: float
    """`‖W* − W0‖_F`."""
    method: str

    @property
    def relative_error(self) -> float:
        return self.error / self.change


@final
@dataclass(frozen=True)
class FitReport:
    """What a fit did."""

    layers: tuple[FittedLayer, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """Of all layers together, as if they were one long vector."""
        return _norm([layer.error for layer in self.layers]) / _norm([layer.change for layer in self.layers])


def smallest_parameters(plan: FitPlan, goal: FitGoal) -> dict[str, int]:
    """The parameters of the least that each layer may have, by path: of the given sizes, or the smallest ones.

    Raises:
        TrloraError: the adapter cannot be built for a layer, which the message names.
    """
    found = {}
    for layer in plan.layers:
        outputs, inputs = layer.shape[0], math.prod(layer.shape[1:])
        try:
            spec = _smallest(goal, inputs, outputs)
            weight = layer.pair.weights()[0].flatten(1)
            adapter = LayerAdapter.from_spec(spec, inputs, outputs, torch.Generator().manual_seed(0), weight)
        except TrloraError as error:
            raise type(error)(f"{layer.path}: {error}") from error
        found[layer.path] = sum(parameter.numel() for parameter in adapter.parameters())
        if found[layer.path] == 0:
            raise TrexportError("transform 'identity' and residual 'none' have no parameters to fit; choose others")
    return found


def check_budget(plan: FitPlan, goal: FitGoal) -> dict[str, int]:
    """`smallest_parameters`, or a `TrexportError` where the budget is below the least of them."""
    smallest = smallest_parameters(plan, goal)
    least = min(smallest, key=lambda path: smallest[path])
    if goal.budget is not None and goal.budget < smallest[least]:
        raise TrexportError(
            f"a budget of {goal.budget} parameters is too small: the smallest that works is {smallest[least]}, for "
            f"{least} alone, and {sum(smallest.values())} for the smallest adapter on all {len(smallest)} layers"
        )
    return smallest


def _smallest(goal: FitGoal, inputs: int, outputs: int) -> AdapterSpec:
    dense = inputs * outputs
    spec = goal.spec
    if goal.free_transform:
        rungs = ladder(spec.transform, lambda tried: tried.build(inputs), dense)
        spec = dataclasses.replace(spec, transform=rungs[0] if rungs else spec.transform)
    if goal.free_residual:
        rungs = ladder(spec.residual, lambda tried: tried.build(inputs, outputs), dense)
        spec = dataclasses.replace(spec, residual=rungs[0] if rungs else spec.residual)
    return spec


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))
