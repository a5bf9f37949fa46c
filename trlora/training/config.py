"""How an adapter is trained: everything that the result depends on but the model, the data and the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, final, get_args

from trlora.errors import TrloraError, nearest
from trlora.training.penalties import Penalty

Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["no", "fp16", "bf16"]
LayerPath = Literal["activations", "weight"]

_FREE = ("checkpoint_every", "keep_checkpoints")
"""What may be another when a training is resumed."""


class TrainingConfigError(TrloraError, ValueError):
    """A training that is described wrongly, or resumed as another than it was."""


@final
@dataclass(frozen=True)
class TrainingConfig:
    """A training's description. The same one, with the same model, data and loss, gives the same bits on the same machine.

    The paper (arXiv 2501.08727, section 5) trains with AdamW at learning rates of 5e-4, 1e-4 and 5e-5, by the task.
    """

    max_steps: int
    """Of the optimiser."""
    batch_size: int = 1
    """Of each process, in each of the `accumulation` batches of a step."""
    accumulation: int = 1
    """Batches whose gradients are added up before a step."""
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    """Of the rate after the warm-up; `linear` and `cosine` end at zero."""
    warmup_steps: int = 0
    """Steps in which the rate rises from zero, as a line."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    """The whole gradient is clipped to this norm; None: it is not."""
    penalty: Penalty = "identity"
    penalty_weight: float = 0.0
    mixed_precision: Precision = "no"
    """Of the products; the cores themselves stay float32."""
    path: LayerPath = "weight"
    """How adapted layers are computed: as dense layers, weights built for every step (see `WeightPath`) and rounded to the
    precision of the products; or the adapter beside the base layer, on the activations."""
    compile: bool = False
    """Compile the model's steps, and what builds the weights, by `torch.compile`: a minute or two at the first step. A model
    of a hundred layers on the path of the activations takes far longer to compile than on that of the weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them; for models of diffusers."""
    ema_decay: float | None = None
    """Of the cores' moving average, which is then what is saved as the adapter."""
    seed: int = 0
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None: there are none."""
    keep_checkpoints: int | None = None
    """How many of the last ones stay; None: all."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation"):
            self._check(
                name, isinstance(getattr(self, name), int) and getattr(self, name) > 0, "a whole number from 1 on"
            )
        for name in ("checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            self._check(
                name, value is None or (isinstance(value, int) and value > 0), "a whole number from 1 on, or None"
            )
        for name in ("warmup_steps", "seed"):
            self._check(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 0, "a whole number from 0 on"
            )
        for name in ("learning_rate", "epsilon"):
            self._check(name, _number(getattr(self, name)) and getattr(self, name) > 0, "a number above 0")
        for name in ("weight_decay", "penalty_weight"):
            self._check(name, _number(getattr(self, name)) and getattr(self, name) >= 0, "a number from 0 on")
        for name in ("beta1", "beta2"):
            self._check(
                name, _number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "a number from 0 to below 1"
            )
        clip, decay = self.max_grad_norm, self.ema_decay
        self._check("max_grad_norm", clip is None or (_number(clip) and clip > 0), "a number above 0, or None")
        self._check(
            "ema_decay", decay is None or (_number(decay) and 0 < decay < 1), "a number between 0 and 1, or None"
        )
        for name, known in (
            ("schedule", Schedule),
            ("penalty", Penalty),
            ("mixed_precision", Precision),
            ("path", LayerPath),
        ):
            self._check(name, getattr(self, name) in get_args(known), f"one of {', '.join(get_args(known))}")
        for name in ("gradient_checkpointing", "compile"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise TrainingConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.learning_rate
        gone = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        left = 1 - min(gone, 1.0) if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(gone, 1.0)))
        return self.learning_rate * left

    def differences(self, other: TrainingConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that differ so that a training of the other cannot go on as one of this: name → this, other.

        The number of steps may be another where the rate does not depend on it.
        """
        free = {*_FREE, *(("max_steps",) if self.schedule == other.schedule == "constant" else ())}
        own, its = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (own[name], its[name]) for name in own if name not in free and own[name] != its[name]}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """
        Raises:
            TrainingConfigError: an unknown or a missing field, or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise TrainingConfigError(f"{name!r} is no field of a training{nearest(name, known)}")
        if "max_steps" not in fields:
            raise TrainingConfigError("max_steps is missing")
        return cls(**fields)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
