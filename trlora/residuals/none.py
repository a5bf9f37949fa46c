"""No residual: a transform alone, as in OFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from trlora.fields import check_known
from trlora.residuals.base import AbstractResidual


@final
class NoResidual(AbstractResidual):
    """Δ = 0, without parameters."""

    trivial: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        return torch.zeros(self.out_features, self.in_features)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.out_features, 0), torch.zeros(self.in_features, 0)


@final
@dataclass(frozen=True)
class NoResidualSpec:
    """`{"type": "none"}`"""

    type: ClassVar[str] = "none"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        check_known("none residual", fields, ())
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type}

    def build(self, in_features: int, out_features: int, generator: torch.Generator | None = None) -> NoResidual:
        return NoResidual(in_features, out_features)

    def from_tensors(self, tensors: dict[str, Tensor]) -> None:
        return None
