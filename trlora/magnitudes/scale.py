"""A scale for every output: (IA)³ (arXiv 2205.05638) where it acts on outputs, and the scale of BOFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.fields import boolean, check_known
from trlora.magnitudes.base import AbstractMagnitude
from trlora.tensors import take


@final
class ScaleMagnitude(AbstractMagnitude):
    """`gain = scale` (out,).

    Args:
        bias: whether the layer's bias is scaled as well: (IA)³ scales outputs, BOFT the weight only.
    """

    def __init__(self, scale: Tensor, bias: bool) -> None:
        super().__init__()
        self.out_features = scale.shape[0]
        self.scales_bias = bias
        self.scale = nn.Parameter(scale)

    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        return self.scale


@final
@dataclass(frozen=True)
class ScaleMagnitudeSpec:
    """`{"type": "scale", "bias": false}`; checkpoint key `scale` (out,)."""

    type: ClassVar[str] = "scale"
    bias: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        check_known("scale magnitude", fields, ("bias",))
        return cls(boolean("scale magnitude", "bias", fields.get("bias", False)))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "bias": self.bias}

    def build(self, out_features: int, weight: Tensor | None = None) -> ScaleMagnitude:
        return ScaleMagnitude(torch.ones(out_features), self.bias)

    def from_tensors(self, tensors: dict[str, Tensor]) -> ScaleMagnitude:
        return ScaleMagnitude(take(tensors, "scale", dims=1), self.bias)
