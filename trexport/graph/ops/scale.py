"""A scale for every output, of (IA)³ (arXiv 2205.05638) and BOFT, in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import MagnitudeOp
from trexport.graph.ops.body import Body
from trlora.magnitudes import ScaleMagnitude


@final
@dataclass(frozen=True)
class ScaleOp(MagnitudeOp):
    """`scale` (out,) of the weight, and where the bias is scaled as well `bias_scale` (out,), the same again."""

    type: ClassVar[str] = "scale"
    telling: ClassVar[str] = "scale"

    @staticmethod
    def values(member: ScaleMagnitude) -> dict[str, Tensor]:
        scale = member.scale.detach().float()
        return {"scale": scale} | ({"bias_scale": scale} if member.scales_bias else {})

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"type": "scale", "bias": "bias_scale" in tensors}, {"scale": tensors["scale"]}

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return "ScaleAll" if "bias_scale" in self.shapes else "Scale"

    def gain(self, body: Body, whole: ir.Value, values: list[ir.Value]) -> ir.Value:
        (rows,) = self.shapes["scale"]
        return body.narrow(body.fold(values[0], [rows, 1]))

    @property
    def scales_bias(self) -> bool:
        return "bias_scale" in self.shapes

    def bias_gain(self, body: Body, values: list[ir.Value]) -> ir.Value:
        gain = body.narrow(values[1])
        return body.fold(gain, [1, *self.shapes["scale"]]) if body.stacked else gain
