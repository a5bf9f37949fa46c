"""One optimiser step on an adapter, plain or on `accelerate`, and the simplest loop over such steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from trlora.errors import TrloraError
from trlora.training.penalties import Penalty, penalty

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → scalar."""


class TrainingError(TrloraError, ArithmeticError):
    """A training that cannot go on: a loss or a gradient that is NaN or Inf, no memory, no room for a checkpoint."""


@final
@dataclass(frozen=True)
class Stepped:
    """What a step found."""

    loss: float
    """Mean over the step's batches, penalty excluded."""
    penalty: float
    """Not weighted; 0 where its weight is."""
    gradient_norm: float
    """Of the whole gradient, before it is clipped. NaN or Inf where a loss scaler has skipped the step."""


def step_(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    number: int = 0,
    prepared: nn.Module | None = None,
    penalty_kind: Penalty = "identity",
    penalty_weight: float = 0.0,
    name: str = "default",
    max_grad_norm: float | None = None,
    accelerator: Any | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Stepped:
    """One optimiser step in place, on the mean loss of some batches, one after another (gradient accumulation).

    Args:
        model: with adapters from `inject_`.
        batches: whatever `loss` understands.
        optimizer: over `trainable_parameters(model)`, prepared where there is an accelerator.
        number: of the step, for messages.
        prepared: what the loss is asked with, as `accelerator.prepare(model)` gave it; `model` unless given.
        penalty_kind, penalty_weight, name: see `penalty`; the term is left out at weight zero.
        max_grad_norm: clip the norm of the whole gradient to this.
        accelerator: an `accelerate.Accelerator`.
        around: entered for every batch, its forward and backward pass, as `WeightPath.built`.

    Raises:
        TrainingError: the loss or its gradient is NaN or Inf; the step is named and the parameters are those before it.
    """
    optimizer.zero_grad()
    asked = model if prepared is None else prepared
    losses: list[Tensor] = []
    term = torch.zeros(())
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        # gradients travel between processes once, with the last batch
        apart = nullcontext() if last or accelerator is None else accelerator.no_sync(asked)
        with apart, around():
            value = loss(asked, batch)
            total = value / len(batches)
            if last and penalty_weight:
                term = penalty(model, penalty_kind, name)
                total = total + penalty_weight * term
            if not torch.isfinite(total):
                raise TrainingError(
                    f"step {number}: the loss is {total.item()}; lower the learning rate or check the batch"
                )
            if accelerator is None:
                total.backward()
            else:
                accelerator.backward(total)
        losses.append(value.detach())
    clip = nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = clip(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    found = math.nan if norm is None else float(norm)
    # a loss scaler of accelerate's skips such a step by itself, and lowers its scale
    scaled = accelerator is not None and accelerator.scaler is not None
    if norm is not None and not scaled and not math.isfinite(found):
        raise TrainingError(f"step {number}: the gradient is {found}; lower the learning rate or check the loss")
    optimizer.step()
    return Stepped(float(torch.stack(losses).float().mean()), float(term.detach()), found)


def train_(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
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
    """Train a model's adapters in place, one optimiser step for every batch. `Trainer` does more: it saves, resumes, logs.

    Args:
        model: with adapters from `inject_`; what is not an adapter is frozen there.
        batches: whatever `loss` understands; as many steps as batches.
        loss: (model, batch) → scalar.
        optimizer: over `trainable_parameters(model)`.
        penalty_kind, penalty_weight, name, max_grad_norm: see `step_`.
        schedule: stepped once a step.
        accelerator: an `accelerate.Accelerator`, which then places model and optimiser and runs the backward pass
            (several devices, mixed precision); None trains where the model is.
        on_step: called with the step's number and its loss.

    Returns:
        The loss of every step, penalty excluded.

    Raises:
        TrainingError: as of `step_`.
    """
    prepared: nn.Module = model
    if accelerator is not None:
        prepared, optimizer = accelerator.prepare(model, optimizer)
    losses: list[float] = []
    for number, batch in enumerate(batches):
        stepped = step_(
            model,
            [batch],
            loss,
            optimizer,
            number=number,
            prepared=prepared,
            penalty_kind=penalty_kind,
            penalty_weight=penalty_weight,
            name=name,
            max_grad_norm=max_grad_norm,
            accelerator=accelerator,
        )
        if schedule is not None:
            schedule.step()
        losses.append(stepped.loss)
        if on_step is not None:
            on_step(number, losses[-1])
    return losses
