"""The norm of DoRA (arXiv 2402.09353) in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.errors import ArtifactError
from trexport.graph.ops.base import MagnitudeOp
from trexport.graph.ops.body import Body
from trlora.magnitudes import NormMagnitude


@final
@dataclass(frozen=True)
class NormOp(MagnitudeOp):
    """`norm` (out,): `gain = norm / ‖W0·T + Δ‖`, row by row, and one where `norm` is zero, which is how a place without an
    adapter looks."""

    type: ClassVar[str] = "norm"
    telling: ClassVar[str] = "norm"

    @staticmethod
    def values(member: NormMagnitude) -> dict[str, Tensor]:
        norm = member.norm.detach().float()
        if not norm.all():
            raise ArtifactError("a norm of zero, which the graph takes for no norm; export it merged")
        return {"norm": norm}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"type": "norm"}, dict(tensors)

    def neutral(self) -> dict[str, Tensor]:
        return {"norm": torch.zeros(self.shapes["norm"])}

    def signature(self) -> str:
        return "Norm"

    def gain(self, body: Body, whole: ir.Value, values: list[ir.Value]) -> ir.Value:
        (rows,) = self.shapes["norm"]
        norm = body.fold(values[0], [rows, 1])
        found = body.op("ReduceL2", body.widen(whole), body.ints([-1]), keepdims=1)
        zero, one = (body.op("CastLike", body.ints([n]), norm) for n in (0, 1))
        divided = body.op("Div", norm, body.op("Where", body.op("Equal", found, zero), one, found))
        return body.narrow(body.op("Where", body.op("Equal", norm, zero), one, divided))
