"""The diagonal transform in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import TransformOp
from trexport.graph.ops.body import Body
from trlora.transforms import DiagonalTransform


@final
@dataclass(frozen=True)
class DiagonalOp(TransformOp):
    """`scale` (in,)."""

    type: ClassVar[str] = "diagonal"
    telling: ClassVar[str] = "scale"

    @staticmethod
    def values(member: DiagonalTransform) -> dict[str, Tensor]:
        return {"scale": member.diagonal().detach().float()}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"type": "diagonal"}, dict(tensors)

    @property
    def fixed(self) -> tuple[int, ...]:
        return self.shapes["scale"]

    def neutral(self) -> dict[str, Tensor]:
        return {"scale": torch.ones(self.shapes["scale"])}

    def signature(self) -> str:
        return "Diagonal"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        return body.op("Mul", x, self._scale(body, values))

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        return body.op("Mul", weight, self._scale(body, values))

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        (n,) = self.shapes["scale"]
        return float(rows * n), 2.0 * rows * n

    def _scale(self, body: Body, values: list[ir.Value]) -> ir.Value:
        scale = body.narrow(values[0])
        return body.fold(scale, [1, *self.shapes["scale"]]) if body.stacked else scale
