"""The block-orthogonal transform of OFT (arXiv 2306.07280) in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.graph.ops.base import TransformOp
from trexport.graph.ops.body import Body, batched
from trlora.transforms import BlockOrthogonalTransform


@final
@dataclass(frozen=True)
class BlockOrthogonalOp(TransformOp):
    """`blocks` (n_blocks, b, b): the orthogonal blocks themselves, for ONNX has no matrix inverse; a checkpoint's `skew` is
    taken through the Cayley map, in float64, when its tensors are made."""

    type: ClassVar[str] = "block_orthogonal"

    @staticmethod
    def values(member: BlockOrthogonalTransform) -> dict[str, Tensor]:
        wide = BlockOrthogonalTransform(member.skew.detach().double(), member.block_size)
        return {"blocks": wide.blocks().detach().float()}

    @property
    def fixed(self) -> tuple[int, ...]:
        return self.shapes["blocks"]

    def neutral(self) -> dict[str, Tensor]:
        count, size, _ = self.shapes["blocks"]
        return {"blocks": torch.eye(size).expand(count, size, size).contiguous()}

    def signature(self) -> str:
        return f"BlockOrthogonal{self.shapes['blocks'][1]}"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        return self._blocked(body, x, rank, body.turn(values[0], [0, 2, 1]))

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value]) -> ir.Value:
        return self._blocked(body, weight, 2, values[0])

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        count, size, _ = self.shapes["blocks"]
        return 2.0 * rows * count * size * size, 4.0 * rows * count * size

    def _blocked(self, body: Body, value: ir.Value, rank: int, blocks: ir.Value) -> ir.Value:
        count, size, _ = self.shapes["blocks"]
        parted = body.reshape(value, batched(rank, [count, 1, size]))
        if body.stacked:  # (stack, rows, blocks, 1, b)
            blocks, rank = body.fold(blocks, [1, count, size, size]), 3
        return body.reshape(body.matmul(parted, body.narrow(blocks)), batched(rank, [count * size]))
