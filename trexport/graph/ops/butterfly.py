"""The butterfly transform of BOFT (arXiv 2311.06243) in a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import TransformOp
from trexport.graph.ops.blocks import blocked, skew_of_blocks
from trexport.graph.ops.body import Body, batched
from trlora.transforms import ButterflyTransform


@final
@dataclass(frozen=True)
class ButterflyOp(TransformOp):
    """`blocks.<i>` (n_blocks, b, b): the orthogonal blocks of factor i, for ONNX has no matrix inverse; a checkpoint's
    `skew` is taken through the Cayley map, in float64, when its tensors are made."""

    type: ClassVar[str] = "butterfly"
    telling: ClassVar[str] = "blocks.0"

    @staticmethod
    def values(member: ButterflyTransform) -> dict[str, Tensor]:
        wide = copy.deepcopy(member).double().blocks().detach().float()
        return {f"blocks.{i}": blocks.contiguous() for i, blocks in enumerate(wide)}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        blocks = torch.stack(list(tensors.values()))
        fields = {"type": "butterfly", "block_size": blocks.shape[-1], "factors": len(blocks)}
        return fields, {"skew": skew_of_blocks(blocks)}

    @property
    def fixed(self) -> tuple[int, tuple[int, ...]]:
        return len(self.shapes), self.shapes["blocks.0"]

    def neutral(self) -> dict[str, Tensor]:
        count, size, _ = self.shapes["blocks.0"]
        return {name: torch.eye(size).expand(count, size, size).contiguous() for name in self.shapes}

    def signature(self) -> str:
        return f"Butterfly{self.shapes['blocks.0'][1]}x{len(self.shapes)}"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        for i in reversed(range(len(values))):
            x = self._factor(body, x, rank, body.turn(values[i], [0, 2, 1]), i)
        return x

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        for i, blocks in enumerate(values):
            weight = self._factor(body, weight, rank, blocks, i)
            rank = 3 if body.stacked else rank
        return weight

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        count, size, _ = self.shapes["blocks.0"]
        each = len(self.shapes) * rows * count * size
        return 2.0 * each * size, 8.0 * each

    def _factor(self, body: Body, value: ir.Value, rank: int, blocks: ir.Value, i: int) -> ir.Value:
        """`value @ P_i·blockdiag(blocks)·P_iᵀ`."""
        count, size, _ = self.shapes["blocks.0"]
        value = self._halves(body, value, rank, i, 2, 2**i)
        value = blocked(body, value, rank, blocks, (count, size, size))
        return self._halves(body, value, 3 if body.stacked else rank, i, 2**i, 2)

    def _halves(self, body: Body, value: ir.Value, rank: int, i: int, outer: int, inner: int) -> ir.Value:
        if i == 0:
            return value
        count, size, _ = self.shapes["blocks.0"]
        groups = count // 2**i
        parted = body.reshape(value, batched(rank, [groups, outer, inner, size // 2]))
        turned = body.transpose(parted, [*range(rank), rank + 1, rank, rank + 2])
        return body.reshape(turned, batched(rank, [count * size]))
