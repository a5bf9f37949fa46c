"""The contract of a magnitude, the output side of an adapter: `W' = diag(gain)·(Uᵀ·W0·T + Δ)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn


class AbstractMagnitude(nn.Module, ABC):
    """A gain for every output of a layer. The names in its `state_dict` are the names in a checkpoint."""

    trivial: ClassVar[bool] = False
    """Whether the gain is one whatever happens, so that a layer can skip it."""

    scales_bias: bool = False
    """Whether the layer's bias takes the gain as well; a member that says so does not depend on the weight."""

    out_features: int

    @abstractmethod
    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        """The gains, (out_features,).

        Args:
            weight: gives `Uᵀ·W0·T + Δ`, (out_features, in_features); called only by members that depend on it.
        """


class MagnitudeSpec(Protocol):
    """How a magnitude is described, built, and read back. One frozen dataclass beside each member implements it."""

    type: ClassVar[str]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From the JSON object without `type`. Raises `SpecError` on an unknown field or a wrong value."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, `type` included."""
        ...

    def build(self, out_features: int, weight: Tensor | None = None) -> AbstractMagnitude:
        """The member at its start, where the adapted layer is the base layer.

        Args:
            weight: W0, (out_features, in_features).

        Raises `SpecError` where the weight is needed and not given."""
        ...

    def from_tensors(self, tensors: dict[str, Tensor]) -> AbstractMagnitude | None:
        """The trained member, taking its tensors out of `tensors`; None for a member without tensors.

        Raises `CheckpointError` when one is missing or contradicts this spec."""
        ...
