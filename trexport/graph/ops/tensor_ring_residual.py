"""The tensor-ring residual of TLoRA (arXiv 2501.08727) in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import ResidualOp, pad
from trexport.graph.ops.body import Body
from trlora.residuals import TensorRingResidual


@final
@dataclass(frozen=True)
class TensorRingResidualOp(ResidualOp):
    """`row_core.<d>` (I_d, R_d, R_{d+1}) over the outputs and `column_core.<d>` (J_d, R_d, R_{d+1}) over the inputs; applied
    as the low-rank map that it is exactly, see `trlora.ring.low_rank_from_cores`."""

    type: ClassVar[str] = "tensor_ring"

    @classmethod
    def of(cls, member: TensorRingResidual) -> Self:
        return cls({name: tuple(core.shape) for name, core in _cores(member).items()})

    @property
    def rank(self) -> int:
        return self.shapes["row_core.0"][1] * self.shapes["column_core.0"][1]

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def tensors(self, member: TensorRingResidual) -> dict[str, Tensor]:
        found = _cores(member)
        try:
            if {name: core.shape[0] for name, core in found.items()} != {k: s[0] for k, s in self.shapes.items()}:
                raise ValueError
            return {name: pad(core, self.shapes[name]) for name, core in found.items()}
        except (ValueError, KeyError):
            raise self.does_not_fit(found) from None

    def signature(self) -> str:
        return f"TR{len(self.shapes) // 2}r{max(shape[1] for shape in self.shapes.values())}"

    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        rows = [shape for name, shape in self.shapes.items() if name.startswith("row_core")]
        columns = [shape for name, shape in self.shapes.items() if name.startswith("column_core")]
        left, of_left = body.chain(values[: len(rows)], rows, ["i", "a", "b"])
        right, of_right = body.chain(values[len(rows) :], columns, ["i", "b", "a"])
        left = body.reshape(left, [of_left["i"], self.rank])
        right = body.reshape(right, [of_right["i"], self.rank])
        return body.narrow(right), body.narrow(left)


def _cores(member: TensorRingResidual) -> dict[str, Tensor]:
    cores = {f"row_core.{d}": core.detach().float() for d, core in enumerate(member.row_core)}
    return cores | {f"column_core.{d}": core.detach().float() for d, core in enumerate(member.column_core)}
