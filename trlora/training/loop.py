"""A training loop for adapters, plain or on `accelerate`. Use it, or read it and write your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trlora.errors import TargetError, TrloraError
from trlora.inject import adapted_modules
from trlora.training.penalties import Penalty, penalty


class TrainingError(TrloraError, ArithmeticError):
    """A loss or a gradient that is NaN or Inf."""


def trainable_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The parameters of one adapter, for an optimiser.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    adapters = [layer.adapters[name] for layer in adapted_modules(model).values() if name in layer.adapters]
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    if not parameters:
        raise TargetError(f"{type(model).__name__} has no adapter {name!r} with parameters; use inject_ first")
    return parameters


def train_(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    penalty_kind: Penalty = "identity",
    penalty_weight: float = 0.0,
    name: str = "default",
    max_grad_norm: float | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    accelerator: Any | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model's adapters in place, one optimiser step for every batch.

    Args:
        model: with adapters from `inject_`; what is not an adapter is frozen there.
        batches: whatever `loss` understands; as many steps as batches.
        loss: (model, batch) → scalar.
        optimizer: over `trainable_parameters(model)`.
        penalty_kind, penalty_weight: see `penalty`; the term is left out at weight zero.
        name: the adapter that the penalty is on.
        max_grad_norm: clip the norm of the whole gradient to this.
        schedule: stepped once a step.
        accelerator: an `accelerate.Accelerator`, which then places model and optimiser and runs the backward pass
            (several devices, mixed precision); None trains where the model is.
        on_step: called with the step's number and its loss.

    Returns:
        The loss of every step, penalty excluded.

    Raises:
        TrainingError: the loss or its gradient is NaN or Inf; the step is named and the parameters are those before it.
    """
    prepared: nn.Module = model
    if accelerator is not None:
        prepared, optimizer = accelerator.prepare(model, optimizer)
    losses: list[float] = []
    for step, batch in enumerate(batches):
        value = loss(prepared, batch)
        total = value + penalty_weight * penalty(model, penalty_kind, name) if penalty_weight else value
        if not torch.isfinite(total):
            raise TrainingError(f"step {step}: the loss is {total.item()}; lower the learning rate or check the batch")
        optimizer.zero_grad()
        if accelerator is None:
            total.backward()
        else:
            accelerator.backward(total)
        clip = nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = clip(parameters, math.inf if max_grad_norm is None else max_grad_norm)
        # a loss scaler of accelerate's skips such a step by itself, and lowers its scale
        scaled = accelerator is not None and accelerator.scaler is not None
        if norm is not None and not scaled and not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: the gradient is {float(norm)}; lower the learning rate or check the loss"
            )
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(value.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses
