"""The Kronecker product of LoKr (arXiv 2309.14859) in a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import ResidualOp
from trexport.graph.ops.body import Body, batched
from trlora.residuals import KroneckerResidual


@final
@dataclass(frozen=True)
class KroneckerOp(ResidualOp):
    """`w1` (a, c) and `w2` (b, d): `Δ = w1 ⊗ w2`. Factors of either are multiplied out, and the scaling is folded into
    `w1`."""

    type: ClassVar[str] = "kronecker"
    telling: ClassVar[str] = "w1"
    has_factors: ClassVar[bool] = False

    @staticmethod
    def values(member: KroneckerResidual) -> dict[str, Tensor]:
        wide = copy.deepcopy(member).double()
        found = {"w1": wide.whole(1) * wide.scaling, "w2": wide.whole(2)}
        return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = {"type": "kronecker", "rank": None, "alpha": None}
        return fields, {"lokr_w1": tensors["w1"], "lokr_w2": tensors["w2"]}

    @property
    def fixed(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes["w1"], self.shapes["w2"]

    @property
    def rank(self) -> int:
        return min(self.shapes["w1"]) * min(self.shapes["w2"])

    @property
    def features(self) -> tuple[int, int]:
        (a, c), (b, d) = self.shapes["w1"], self.shapes["w2"]
        return a * b, c * d

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return f"Kronecker{'x'.join(map(str, self.shapes['w1']))}"

    def apply(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], strength: ir.Value) -> ir.Value:
        (a, c), (b, d) = self.shapes["w1"], self.shapes["w2"]
        w1, w2 = body.op("Mul", body.narrow(values[0]), strength), body.turn(body.narrow(values[1]), [1, 0])
        if body.stacked:  # (stack, rows, c, d)
            w1, w2 = body.fold(w1, [1, a, c]), body.fold(w2, [1, d, b])
        met = body.matmul(w1, body.matmul(body.reshape(x, batched(rank, [c, d])), w2))
        return body.reshape(met, batched(rank, [a * b]))

    def delta(self, body: Body, values: list[ir.Value]) -> ir.Value:
        (a, c), (b, d) = self.shapes["w1"], self.shapes["w2"]
        product = body.op("Mul", body.fold(values[0], [a, 1, c, 1]), body.fold(values[1], [1, b, 1, d]))
        return body.narrow(body.fold(product, [a * b, c * d]))

    def work(self, rows: int) -> float:
        (a, c), (b, d) = self.shapes["w1"], self.shapes["w2"]
        return 2.0 * rows * (c * d * b + a * c * b)

    def delta_work(self) -> float:
        rows, columns = self.features
        return float(rows * columns)
