"""The transform that leaves the weight alone: LoRA's and LoRETTA's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from trlora.fields import check_known
from trlora.transforms.base import AbstractTransform


@final
class IdentityTransform(AbstractTransform):
    """T = I, without parameters."""

    trivial: ClassVar[bool] = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def matrix(self) -> Tensor:
        return torch.eye(self.features)

    def multiply(self, weight: Tensor) -> Tensor:
        return weight

    def identity_penalty(self) -> Tensor:
        return torch.zeros(())

    def orthogonal_penalty(self) -> Tensor:
        return torch.zeros(())


@final
@dataclass(frozen=True)
class IdentityTransformSpec:
    """`{"type": "identity"}`"""

    type: ClassVar[str] = "identity"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        check_known("identity transform", fields, ())
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type}

    def build(self, features: int, generator: torch.Generator | None = None) -> IdentityTransform:
        return IdentityTransform(features)

    def from_tensors(self, tensors: dict[str, Tensor]) -> None:
        return None
