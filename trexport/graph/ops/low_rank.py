"""The residual of LoRA (arXiv 2106.09685) in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import ResidualOp, pad
from trexport.graph.ops.body import Body
from trlora.residuals import LowRankResidual


@final
@dataclass(frozen=True)
class LowRankOp(ResidualOp):
    """`lora_A.weight` (r, in) and `lora_B.weight` (out, r); a checkpoint's alpha / r is folded into the latter."""

    type: ClassVar[str] = "low_rank"

    @classmethod
    def of(cls, member: LowRankResidual) -> Self:
        return cls({name: tuple(tensor.shape) for name, tensor in _factors(member).items()})

    @property
    def rank(self) -> int:
        return self.shapes["lora_A.weight"][0]

    def neutral(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.shapes.items()}

    def tensors(self, member: LowRankResidual) -> dict[str, Tensor]:
        found = _factors(member)
        a, b = found["lora_A.weight"], found["lora_B.weight"]
        if (b.shape[0], a.shape[1]) != (self.shapes["lora_B.weight"][0], self.shapes["lora_A.weight"][1]):
            raise self.does_not_fit(found)
        try:
            return {name: pad(tensor, self.shapes[name]) for name, tensor in found.items()}
        except ValueError:
            raise self.does_not_fit(found) from None

    def signature(self) -> str:
        return f"LowRank{self.rank}"

    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        a, b = values
        return body.narrow(body.transpose(a, [1, 0])), body.narrow(b)


def _factors(member: LowRankResidual) -> dict[str, Tensor]:
    b = member.lora_B.weight.detach().float() * member.scaling
    return {"lora_A.weight": member.lora_A.weight.detach().float(), "lora_B.weight": b}
