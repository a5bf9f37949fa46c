"""The contract of a transform, the T in `W' = W0·T + Δ`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn


class AbstractTransform(nn.Module, ABC):
    """A linear map of a layer's input space, `(features,) → (features,)`.

    Calling it applies it to activations without forming the matrix; the law every member keeps is
    `transform(x) == x @ transform.matrix().T` and `transform.multiply(w) == w @ transform.matrix()`.
    (The activation path is `forward`, since `nn.Module.apply` is taken.)
    The names in its `state_dict` are the names in a checkpoint.
    """

    trivial: ClassVar[bool] = False
    """Whether this member is the identity whatever happens, so that a layer can skip it."""

    features: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`(*batch, features) → (*batch, features)`: `x @ T.T`."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The dense T, `(features, features)`."""

    @abstractmethod
    def multiply(self, weight: Tensor) -> Tensor:
        """`weight @ T`, (rows, features) → (rows, features), without forming T where that is cheaper."""

    def change(self, weight: Tensor) -> Tensor:
        """`weight @ (T − I)`, a new tensor. Members that know it better than by a difference override it."""
        return self.multiply(weight) - weight

    def fitted(self, channels: int, features: int) -> Self | None:
        """This transform for a layer, or None where it does not fit. Members that know only a part of the layer's shape
        override it.

        Args:
            channels: the layer's inputs without the taps of a kernel; of a linear layer its features.
            features: the width of the layer's weight as a matrix.
        """
        return self if features == self.features else None

    @abstractmethod
    def identity_penalty(self) -> Tensor:
        """A scalar, zero where T is the identity; used to hold training near the pre-trained weight."""

    @abstractmethod
    def orthogonal_penalty(self) -> Tensor:
        """A scalar whose zero makes T orthogonal."""


class TransformSpec(Protocol):
    """How a transform is described, built, and read back. One frozen dataclass beside each member implements it."""

    type: ClassVar[str]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From the JSON object without `type`. Raises `SpecError` on an unknown field or a wrong value."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, `type` included."""
        ...

    def build(self, features: int, generator: torch.Generator | None = None) -> AbstractTransform:
        """The member at its start, the identity. Raises `SpecError` or `ShapeError` where it cannot be."""
        ...

    def from_tensors(self, tensors: dict[str, Tensor]) -> AbstractTransform | None:
        """The trained member, taking its tensors out of `tensors`; None for a member without tensors.

        Raises `CheckpointError` when one is missing or contradicts this spec, `ShapeError` when they do not fit."""
        ...
