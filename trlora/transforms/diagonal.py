"""A scale for every input feature. DoRA without its norm is this transform plus a low-rank residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.fields import check_known
from trlora.tensors import take
from trlora.transforms.base import AbstractTransform


@final
class DiagonalTransform(AbstractTransform):
    """T = diag(scale), `scale` of shape (features / taps,), each entry for `taps` neighbouring features: those of one
    channel of a convolution."""

    def __init__(self, scale: Tensor, taps: int = 1) -> None:
        super().__init__()
        self.features = scale.shape[0] * taps
        self.taps = taps
        self.scale = nn.Parameter(scale)

    def diagonal(self) -> Tensor:
        """The diagonal of T, (features,)."""
        return self.scale if self.taps == 1 else self.scale.repeat_interleave(self.taps)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.diagonal()

    def matrix(self) -> Tensor:
        return torch.diag(self.diagonal())

    def multiply(self, weight: Tensor) -> Tensor:
        return weight * self.diagonal()

    def fitted(self, channels: int, features: int) -> Self | None:
        """A scale for every channel of a convolution holds for all taps of its kernel."""
        if len(self.scale) == channels and features % channels == 0:
            return self if features == self.features else type(self)(self.scale.data, features // channels)
        return super().fitted(channels, features)

    def identity_penalty(self) -> Tensor:
        return torch.linalg.vector_norm(self.scale - 1)

    def orthogonal_penalty(self) -> Tensor:
        return torch.linalg.vector_norm(self.scale.square() - 1)


@final
@dataclass(frozen=True)
class DiagonalTransformSpec:
    """`{"type": "diagonal"}`; checkpoint key `scale` (in,); of a convolution (in,) or (in·kernel,)."""

    type: ClassVar[str] = "diagonal"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        check_known("diagonal transform", fields, ())
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type}

    def build(self, features: int, generator: torch.Generator | None = None) -> DiagonalTransform:
        return DiagonalTransform(torch.ones(features))

    def from_tensors(self, tensors: dict[str, Tensor]) -> DiagonalTransform:
        return DiagonalTransform(take(tensors, "scale", dims=1))
