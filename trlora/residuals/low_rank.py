"""The residual of LoRA (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from trlora.errors import CheckpointError, ShapeError
from trlora.factor import Factor
from trlora.fields import alpha_of, check_known, positive_int
from trlora.residuals.base import AbstractResidual
from trlora.tensors import contradiction, take


@final
class LowRankResidual(AbstractResidual):
    """`Δ = (alpha / r) · B·A`, with `lora_A.weight` (r, in) and `lora_B.weight` (out, r)."""

    def __init__(self, a: Tensor, b: Tensor, alpha: float) -> None:
        super().__init__()
        if a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"lora_A.weight {tuple(a.shape)} and lora_B.weight {tuple(b.shape)} found, expected (r, in) and (out, r)"
            )
        self.in_features = a.shape[1]
        self.out_features = b.shape[0]
        self.scaling = alpha / a.shape[0]
        self.lora_A = Factor(a)
        self.lora_B = Factor(b)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.lora_A.weight.T) @ self.lora_B.weight.T * self.scaling

    def add_to(self, weight: Tensor) -> Tensor:
        left, right = self.low_rank()
        return weight.addmm_(left.to(weight), right.T.to(weight))

    def delta(self) -> Tensor:
        return self.lora_B.weight @ self.lora_A.weight * self.scaling

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.lora_B.weight * self.scaling, self.lora_A.weight.T


@final
@dataclass(frozen=True)
class LowRankResidualSpec:
    """`{"type": "low_rank", "rank": r, "alpha": null or a number}`; alpha null means r, a scaling of one.

    Checkpoint keys `lora_A.weight` (r, in) and `lora_B.weight` (out, r).
    """

    type: ClassVar[str] = "low_rank"
    rank: int = 4
    alpha: float | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "low_rank residual"
        check_known(kind, fields, ("rank", "alpha"))
        return cls(positive_int(kind, "rank", fields.get("rank", cls.rank)), alpha_of(kind, fields.get("alpha")))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "rank": self.rank, "alpha": self.alpha}

    def build(self, in_features: int, out_features: int, generator: torch.Generator | None = None) -> LowRankResidual:
        # PEFT's start: nn.Linear's own (Kaiming uniform, a = √5, so a bound of 1/√in) for A, zero for B
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(self.rank, in_features).uniform_(-bound, bound, generator=generator)
        return LowRankResidual(a, torch.zeros(out_features, self.rank), self.rank if self.alpha is None else self.alpha)

    def from_tensors(self, tensors: dict[str, Tensor]) -> LowRankResidual:
        a, b = take(tensors, "lora_A.weight", dims=2), take(tensors, "lora_B.weight", dims=2)
        if a.shape[0] == b.shape[1] != self.rank:
            raise contradiction("rank", self.rank, a.shape[0])
        if a.shape[0] == 0:
            raise CheckpointError("lora_A.weight: rank 0 found, expected at least 1")
        return LowRankResidual(a, b, self.rank if self.alpha is None else self.alpha)
