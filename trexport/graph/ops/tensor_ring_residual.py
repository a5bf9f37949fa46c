"""The tensor-ring residual of TLoRA (arXiv 2501.08727) in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import ResidualOp
from trexport.graph.ops.body import Body
from trlora.residuals import TensorRingResidual


@final
@dataclass(frozen=True)
class TensorRingResidualOp(ResidualOp):
    """`row_core.<d>` (I_d, R_d, R_{d+1}) over the outputs and `column_core.<d>` (J_d, R_d, R_{d+1}) over the inputs; applied
    as the low-rank map that it is exactly, see `trlora.ring.low_rank_from_cores`."""

    type: ClassVar[str] = "tensor_ring"
    telling: ClassVar[str] = "row_core.0"

    @staticmethod
    def values(member: TensorRingResidual) -> dict[str, Tensor]:
        cores = {f"row_core.{d}": core.detach().float() for d, core in enumerate(member.row_core)}
        return cores | {f"column_core.{d}": core.detach().float() for d, core in enumerate(member.column_core)}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rows = [core for name, core in tensors.items() if name.startswith("row_core")]
        columns = [core for name, core in tensors.items() if name.startswith("column_core")]
        modes = {"row": [core.shape[0] for core in rows], "column": [core.shape[0] for core in columns]}
        ranks = [core.shape[1] for core in (*rows, *columns)]
        return {"type": "tensor_ring", "order": len(rows), "rank": ranks, "modes": modes}, dict(tensors)

    @property
    def fixed(self) -> dict[str, int]:
        """The modes."""
        return {name: shape[0] for name, shape in self.shapes.items()}

    @property
    def rank(self) -> int:
        return self.shapes["row_core.0"][1] * self.shapes["column_core.0"][1]

    @property
    def features(self) -> tuple[int, int]:
        rows, columns = self._split()
        return math.prod(shape[0] for shape in rows), math.prod(shape[0] for shape in columns)

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return f"TR{len(self.shapes) // 2}r{max(shape[1] for shape in self.shapes.values())}"

    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        rows, columns = self._split()
        left, of_left = body.chain(values[: len(rows)], rows, ["i", "a", "b"])
        right, of_right = body.chain(values[len(rows) :], columns, ["i", "b", "a"])
        left = body.fold(left, [of_left["i"], self.rank])
        right = body.fold(right, [of_right["i"], self.rank])
        return body.narrow(right), body.narrow(left)

    def _split(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """The shapes of the row cores and of the column cores."""
        rows = [shape for name, shape in self.shapes.items() if name.startswith("row_core")]
        return rows, [shape for name, shape in self.shapes.items() if name.startswith("column_core")]
