"""The tensor-ring transform of TLoRA (arXiv 2501.08727) in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import TransformOp, pad
from trexport.graph.ops.body import Body, batched
from trlora.transforms import TensorRingTransform


@final
@dataclass(frozen=True)
class TensorRingTransformOp(TransformOp):
    """`core.<d>` (I_d, I_d, R_d, R_{d+1}). The ring is cut into two chains, G over the fast modes and H over the slow ones,
    see `trlora.ring.multiply_cores`: two products and no transposition of what is transformed."""

    type: ClassVar[str] = "tensor_ring"
    telling: ClassVar[str] = "core.0"

    @staticmethod
    def values(member: TensorRingTransform) -> dict[str, Tensor]:
        return {f"core.{d}": core.detach().float() for d, core in enumerate(member.core)}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cores = list(tensors.values())
        ranks, modes = [core.shape[2] for core in cores], [core.shape[0] for core in cores]
        return {"type": "tensor_ring", "order": len(cores), "rank": ranks, "modes": modes}, dict(tensors)

    @property
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """The modes."""
        return {name: shape[:2] for name, shape in self.shapes.items()}

    def neutral(self) -> dict[str, Tensor]:
        # the identity as a ring of rank 1, padded: exact for every rank, where I/R is so for powers of two only
        return {
            name: pad(torch.eye(shape[0])[:, :, None, None], shape)  # one slice
            for name, shape in self.shapes.items()
        }

    def signature(self) -> str:
        return f"TRM{len(self.shapes)}r{max(shape[2] for shape in self.shapes.values())}"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        if dense or len(self.shapes) == 1:
            return body.matmul(x, self._dense(body, values, turned=True))
        return self._chains(body, x, rank, values, rows="j", columns="i")

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        if len(self.shapes) == 1:
            return body.matmul(weight, self._dense(body, values, turned=False))
        return self._chains(body, weight, rank, values, rows="i", columns="j")

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        n = math.prod(shape[0] for shape in self.shapes.values())
        if dense or len(self.shapes) == 1:
            ranks = max(shape[2] * shape[3] for shape in self.shapes.values())
            # bringing T's six axes into order was seen to cost as much as moving it forty times
            return 2.0 * n * n * (rows + ranks), 2.0 * rows * n + 40.0 * n * n
        flops, middle = self._cost(self._cut())
        return float(rows * flops), float(rows * (2 * n + 2 * middle))

    def _chains(
        self, body: Body, value: ir.Value, rank: int, values: list[ir.Value], rows: str, columns: str
    ) -> ir.Value:
        """`value @ M` where M is T (rows i, columns j) or its transpose (rows j, columns i)."""
        cut, shapes = self._cut(), list(self.shapes.values())
        fast, of_fast = body.chain(values[:cut], shapes[:cut], [rows, "a", "b", columns])
        slow, of_slow = body.chain(values[cut:], shapes[cut:], [columns, rows, "b", "a"])
        ranks = of_fast["a"] * of_fast["b"]
        left = body.narrow(body.fold(fast, [of_fast["i"], ranks * of_fast["j"]]))
        right = body.narrow(body.fold(slow, [of_slow["j"], of_slow["i"] * ranks]))
        met = body.matmul(body.reshape(value, batched(rank, [of_fast["i"]])), left)
        if body.stacked:  # one matrix a member of the stack, whatever the rows
            right, rank = body.fold(right, [1, of_slow["j"], of_slow["i"] * ranks]), 3
        met = body.reshape(met, batched(rank, [of_slow["i"] * ranks, of_fast["j"]]))
        return body.reshape(body.matmul(right, met), batched(rank, [of_slow["j"] * of_fast["j"]]))

    def _dense(self, body: Body, values: list[ir.Value], *, turned: bool) -> ir.Value:
        """T, or its transpose."""
        shapes = list(self.shapes.values())
        n = math.prod(shape[0] for shape in shapes)
        if len(shapes) == 1:
            eye = body.op("EyeLike", body.op("ConstantOfShape", body.ints(shapes[0][2:])))
            summed = body.op("ReduceSum", body.op("Mul", values[0], eye), body.ints([-2, -1]), keepdims=0)
            return body.narrow(body.turn(summed, [1, 0] if turned else [0, 1]))
        fast, a = body.chain(values[:-1], shapes[:-1], ["i", "j", "a", "b"])
        last = shapes[-1]
        ranks = a["a"] * a["b"]
        slow = body.fold(body.turn(values[-1], [3, 2, 0, 1]), [ranks, last[0] * last[1]])
        met = body.matmul(body.fold(fast, [a["i"] * a["j"], ranks]), slow)
        met = body.fold(met, [a["i"], a["j"], last[0], last[1]])
        return body.narrow(body.fold(body.turn(met, [3, 1, 2, 0] if turned else [2, 0, 3, 1]), [n, n]))

    def _cut(self) -> int:
        return min(range(1, len(self.shapes)), key=lambda cut: self._cost(cut)[0])

    def _cost(self, cut: int) -> tuple[int, int]:
        """Operations and intermediate elements for each row."""
        shapes = list(self.shapes.values())
        a = math.prod(shape[0] for shape in shapes[:cut])
        b = math.prod(shape[0] for shape in shapes[cut:])
        ranks = shapes[0][2] * shapes[cut][2]
        return 2 * a * b * ranks * (a + b), a * b * ranks
