"""The identity and a low-rank map, of GLoRA (arXiv 2306.07967), in a graph."""

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
from trlora.transforms import LowRankTransform


@final
@dataclass(frozen=True)
class LowRankTransformOp(TransformOp):
    """`lora_A.weight` (r, in) and `lora_B.weight` (in, r) with `T = I + B·A`; a checkpoint's alpha / r is folded into the
    latter, and what mixes the channels of a convolution is repeated for every tap."""

    type: ClassVar[str] = "low_rank"
    telling: ClassVar[str] = "lora_A.weight"

    @staticmethod
    def values(member: LowRankTransform) -> dict[str, Tensor]:
        left, right = copy.deepcopy(member).double().factors()  # rounded once, at the end
        return {
            "lora_A.weight": right.detach().float().T.contiguous(),
            "lora_B.weight": left.detach().float().contiguous(),
        }

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"type": "low_rank", "rank": len(tensors["lora_A.weight"]), "alpha": None}, dict(tensors)

    @property
    def fixed(self) -> int:
        return self.shapes["lora_A.weight"][1]

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return f"OnePlusLowRank{self.shapes['lora_A.weight'][0]}"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        a, b = (body.narrow(body.turn(value, [1, 0])) for value in values)
        return body.op("Add", x, body.matmul(body.matmul(x, a), b))

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        a, b = (body.narrow(value) for value in values)
        return body.op("Add", weight, body.matmul(body.matmul(weight, b), a))

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        rank, features = self.shapes["lora_A.weight"]
        return 4.0 * rows * features * rank, 4.0 * rows * features
