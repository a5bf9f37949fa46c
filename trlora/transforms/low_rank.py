"""The identity and a low-rank map: the transform of GLoRA (arXiv 2306.07967)."""

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
from trlora.tensors import contradiction, take
from trlora.transforms.base import AbstractTransform


@final
class LowRankTransform(AbstractTransform):
    """`T = (I + (alpha / r)·B·A) ⊗ I_taps`, with `lora_A.weight` (r, in) and `lora_B.weight` (in, r).

    Args:
        taps: neighbouring features that each entry is for: those of one channel of a convolution.
    """

    def __init__(self, a: Tensor, b: Tensor, alpha: float, taps: int = 1) -> None:
        super().__init__()
        if a.shape != b.T.shape:
            raise ShapeError(
                f"lora_A.weight {tuple(a.shape)} and lora_B.weight {tuple(b.shape)} found, expected (r, in) and (in, r)"
            )
        self.features = a.shape[1] * taps
        self.taps = taps
        self.alpha = alpha
        self.lora_A = Factor(a)
        self.lora_B = Factor(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and R (features, r·taps) with `T = I + L·Rᵀ`."""
        left, right = self._thin()
        if self.taps == 1:
            return left, right
        eye = torch.eye(self.taps, dtype=left.dtype, device=left.device)
        return torch.kron(left, eye), torch.kron(right.contiguous(), eye)

    @property
    def scaling(self) -> float:
        return self.alpha / self.lora_A.weight.shape[0]

    def _thin(self) -> tuple[Tensor, Tensor]:
        """The factors of one tap."""
        return self.lora_B.weight * self.scaling, self.lora_A.weight.T

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        return x + (x @ right) @ left.T

    def matrix(self) -> Tensor:
        left, right = self.factors()
        return torch.eye(self.features, dtype=left.dtype, device=left.device) + left @ right.T

    def multiply(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight)

    def change(self, weight: Tensor) -> Tensor:
        left, right = self._thin()
        if self.taps == 1:
            return (weight @ left) @ right.T
        by_channel = weight.unflatten(-1, (-1, self.taps)).transpose(-1, -2)
        return ((by_channel @ left) @ right.T).transpose(-1, -2).flatten(-2)

    def fitted(self, channels: int, features: int) -> Self | None:
        """What mixes the channels of a convolution does so for every tap of its kernel."""
        if self.lora_A.weight.shape[1] == channels and features % channels == 0:
            taps = features // channels
            a, b = self.lora_A.weight.data, self.lora_B.weight.data
            return self if taps == self.taps else type(self)(a, b, self.alpha, taps)
        return super().fitted(channels, features)

    def identity_penalty(self) -> Tensor:
        left, right = self.factors()
        return torch.linalg.vector_norm(left @ right.T)

    def orthogonal_penalty(self) -> Tensor:
        matrix = self.matrix()
        return torch.linalg.vector_norm(matrix @ matrix.T - torch.eye(len(matrix)).to(matrix))


@final
@dataclass(frozen=True)
class LowRankTransformSpec:
    """`{"type": "low_rank", "rank": r, "alpha": null or a number}`; alpha null means r, a scaling of one.

    Checkpoint keys `lora_A.weight` (r, in) and `lora_B.weight` (in, r); of a convolution (in,) is its channels, or those
    times the taps of its kernel.
    """

    type: ClassVar[str] = "low_rank"
    rank: int = 4
    alpha: float | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "low_rank transform"
        check_known(kind, fields, ("rank", "alpha"))
        return cls(positive_int(kind, "rank", fields.get("rank", cls.rank)), alpha_of(kind, fields.get("alpha")))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "rank": self.rank, "alpha": self.alpha}

    def build(self, features: int, generator: torch.Generator | None = None) -> LowRankTransform:
        bound = 1 / math.sqrt(features)  # as of the low-rank residual
        a = torch.empty(self.rank, features).uniform_(-bound, bound, generator=generator)
        return LowRankTransform(a, torch.zeros(features, self.rank), self.rank if self.alpha is None else self.alpha)

    def from_tensors(self, tensors: dict[str, Tensor]) -> LowRankTransform:
        a, b = take(tensors, "lora_A.weight", dims=2), take(tensors, "lora_B.weight", dims=2)
        if a.shape[0] == b.shape[1] != self.rank:
            raise contradiction("rank", self.rank, a.shape[0])
        if a.shape[0] == 0:
            raise CheckpointError("lora_A.weight: rank 0 found, expected at least 1")
        return LowRankTransform(a, b, self.rank if self.alpha is None else self.alpha)
