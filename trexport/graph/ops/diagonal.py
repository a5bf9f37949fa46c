"""The diagonal transform in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

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

    @classmethod
    def of(cls, member: DiagonalTransform) -> Self:
        return cls({"scale": (member.features,)})

    def neutral(self) -> dict[str, Tensor]:
        return {"scale": torch.ones(self.shapes["scale"])}

    def tensors(self, member: DiagonalTransform) -> dict[str, Tensor]:
        found = {"scale": member.scale.detach().float()}
        if tuple(found["scale"].shape) != self.shapes["scale"]:
            raise self.does_not_fit(found)
        return found

    def signature(self) -> str:
        return "Diagonal"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        return body.op("Mul", x, body.narrow(values[0]))

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value]) -> ir.Value:
        return body.op("Mul", weight, body.narrow(values[0]))

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        (n,) = self.shapes["scale"]
        return float(rows * n), 2.0 * rows * n
