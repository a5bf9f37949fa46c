"""The residual of LoRA (arXiv 2106.09685) in a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import ResidualOp
from trexport.graph.ops.body import Body
from trlora.residuals import AbstractResidual


@final
@dataclass(frozen=True)
class LowRankOp(ResidualOp):
    """`lora_A.weight` (r, in) and `lora_B.weight` (out, r); a checkpoint's alpha / r is folded into the latter. Takes every
    residual, as the low-rank map that it is exactly."""

    type: ClassVar[str] = "low_rank"
    telling: ClassVar[str] = "lora_A.weight"
    universal: ClassVar[bool] = True

    @staticmethod
    def values(member: AbstractResidual) -> dict[str, Tensor]:
        left, right = copy.deepcopy(member).double().low_rank()  # rounded once, at the end
        return {
            "lora_A.weight": right.detach().float().T.contiguous(),
            "lora_B.weight": left.detach().float().contiguous(),
        }

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"type": "low_rank", "rank": len(tensors["lora_A.weight"]), "alpha": None}, dict(tensors)

    @classmethod
    def holding(cls, residuals: Sequence[ResidualOp]) -> Self:
        """The smallest that takes what each of these takes; all are of one layer."""
        rank, (rows, columns) = max(residual.rank for residual in residuals), residuals[0].features
        return cls({"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)})

    @property
    def fixed(self) -> tuple[int, int]:
        return self.features

    @property
    def rank(self) -> int:
        return self.shapes["lora_A.weight"][0]

    @property
    def features(self) -> tuple[int, int]:
        return self.shapes["lora_B.weight"][0], self.shapes["lora_A.weight"][1]

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def signature(self) -> str:
        return f"LowRank{self.rank}"

    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        a, b = values
        return body.narrow(body.turn(a, [1, 0])), body.narrow(b)
