"""The reflections of HRA (arXiv 2405.17484) in a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import TransformOp
from trexport.graph.ops.body import Body
from trlora.transforms import HouseholderTransform


@final
@dataclass(frozen=True)
class HouseholderOp(TransformOp):
    """`left` and `right` (in, r) with `T = I − left·rightᵀ`, which a product of r reflections is; made from a checkpoint's
    `vectors` in float64."""

    type: ClassVar[str] = "householder"
    telling: ClassVar[str] = "left"

    @staticmethod
    def values(member: HouseholderTransform) -> dict[str, Tensor]:
        left, right = copy.deepcopy(member).double().factors()
        return {"left": left.detach().float().contiguous(), "right": right.detach().float().contiguous()}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        # as the change of low rank that they are: which reflections they were, the product does not tell
        fields = {"type": "low_rank", "rank": tensors["left"].shape[1], "alpha": None}
        return fields, {"lora_A.weight": tensors["right"].T.contiguous(), "lora_B.weight": -tensors["left"]}

    @property
    def fixed(self) -> int:
        return self.shapes["left"][0]

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return f"Householder{self.shapes['left'][1]}"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        left, right = (body.narrow(value) for value in values)
        return body.op("Sub", x, body.matmul(body.matmul(x, right), body.turn(left, [1, 0])))

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        left, right = (body.narrow(value) for value in values)
        return body.op("Sub", weight, body.matmul(body.matmul(weight, left), body.turn(right, [1, 0])))

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        features, rank = self.shapes["left"]
        return 4.0 * rows * features * rank, 4.0 * rows * features
