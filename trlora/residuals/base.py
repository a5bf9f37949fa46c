"""The contract of a residual, the Δ in `W' = W0·T + Δ`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn


class AbstractResidual(nn.Module, ABC):
    """A linear map from a layer's input space to its output space, `(in_features,) → (out_features,)`.

    Calling it applies it to activations; the law every member keeps is `residual(x) == x @ residual.delta().T`.
    The names in its `state_dict` are the names in a checkpoint.
    """

    trivial: ClassVar[bool] = False
    """Whether this member is zero whatever happens, so that a layer can skip it."""

    in_features: int
    out_features: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`(*batch, in_features) → (*batch, out_features)`: `x @ Δ.T`."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The dense Δ, `(out_features, in_features)`: a new tensor, which the caller may change in place."""

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight + Δ`, in place. Members that need not form Δ for it override it.

        Args:
            weight: (out_features, in_features), of any dtype.
        """
        return weight.add_(self.delta().to(weight))

    @abstractmethod
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """L `(out_features, r)` and R `(in_features, r)` with `Δ = L·Rᵀ` exactly, r no greater than the form needs."""


class ResidualSpec(Protocol):
    """How a residual is described, built, and read back. One frozen dataclass beside each member implements it."""

    type: ClassVar[str]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From the JSON object without `type`. Raises `SpecError` on an unknown field or a wrong value."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, `type` included."""
        ...

    def build(self, in_features: int, out_features: int, generator: torch.Generator | None = None) -> AbstractResidual:
        """The member at its start, zero. Raises `SpecError` or `ShapeError` where it cannot be."""
        ...

    def from_tensors(self, tensors: dict[str, Tensor]) -> AbstractResidual | None:
        """The trained member, taking its tensors out of `tensors`; None for a member without tensors.

        Raises `CheckpointError` when one is missing or contradicts this spec, `ShapeError` when they do not fit."""
        ...
