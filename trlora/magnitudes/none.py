"""No magnitude: the outputs as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from trlora.fields import check_known
from trlora.magnitudes.base import AbstractMagnitude


@final
class NoMagnitude(AbstractMagnitude):
    """A gain of one, without parameters."""

    trivial: ClassVar[bool] = True

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        return torch.ones(self.out_features)


@final
@dataclass(frozen=True)
class NoMagnitudeSpec:
    """`{"type": "none"}`"""

    type: ClassVar[str] = "none"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        check_known("none magnitude", fields, ())
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type}

    def build(self, out_features: int, weight: Tensor | None = None) -> NoMagnitude:
        return NoMagnitude(out_features)

    def from_tensors(self, tensors: dict[str, Tensor]) -> None:
        return None
