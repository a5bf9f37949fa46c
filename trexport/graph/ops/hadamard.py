"""The entrywise product of LoHa (arXiv 2108.06098) in a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import ResidualOp
from trexport.graph.ops.body import Body
from trlora.residuals import HadamardResidual


@final
@dataclass(frozen=True)
class HadamardOp(ResidualOp):
    """`a1`, `a2` (out, r) and `b1`, `b2` (r, in): `Δ = (a1·b1) ⊙ (a2·b2)`. alpha / r is folded into `a1`, the core of a
    Tucker form into the b's."""

    type: ClassVar[str] = "hadamard"
    telling: ClassVar[str] = "a1"

    @staticmethod
    def values(member: HadamardResidual) -> dict[str, Tensor]:
        wide = copy.deepcopy(member).double()
        (a1, b1), (a2, b2) = wide.factors(1), wide.factors(2)
        found = {"a1": a1 * wide.scaling, "b1": b1, "a2": a2, "b2": b2}
        return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = {"type": "hadamard", "rank": tensors["a1"].shape[1], "alpha": None, "kernel": None}
        names = {"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b"}
        return fields, {names[name]: tensor for name, tensor in tensors.items()}

    @property
    def fixed(self) -> tuple[int, int]:
        return self.features

    @property
    def rank(self) -> int:
        return self.shapes["a1"][1] ** 2

    @property
    def features(self) -> tuple[int, int]:
        return self.shapes["a1"][0], self.shapes["b1"][1]

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return f"Hadamard{self.shapes['a1'][1]}"

    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Products of every column with every column."""
        (rows, columns), rank = self.features, self.shapes["a1"][1]
        a1, b1, a2, b2 = values
        left = body.op("Mul", body.fold(a1, [rows, rank, 1]), body.fold(a2, [rows, 1, rank]))
        right = body.op("Mul", body.fold(b1, [rank, 1, columns]), body.fold(b2, [1, rank, columns]))
        right = body.turn(body.fold(right, [rank * rank, columns]), [1, 0])
        return body.narrow(right), body.narrow(body.fold(left, [rows, rank * rank]))

    def delta(self, body: Body, values: list[ir.Value]) -> ir.Value:
        a1, b1, a2, b2 = values
        return body.narrow(body.op("Mul", body.matmul(a1, b1), body.matmul(a2, b2)))

    def delta_work(self) -> float:
        rows, columns = self.features
        return 4.0 * rows * columns * self.shapes["a1"][1]
