"""The block-orthogonal transform of OFT (arXiv 2306.07280) in a graph."""

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
from trexport.graph.ops.body import Body
from trlora.transforms import BlockOrthogonalTransform


@final
@dataclass(frozen=True)
class BlockOrthogonalOp(TransformOp):
    """`blocks` (n_blocks, b, b): the orthogonal blocks themselves, for ONNX has no matrix inverse; a checkpoint's `skew` is
    taken through its Cayley map or series, in float64, when its tensors are made, and a shared block is repeated."""

    type: ClassVar[str] = "block_orthogonal"
    telling: ClassVar[str] = "blocks"

    @staticmethod
    def values(member: BlockOrthogonalTransform) -> dict[str, Tensor]:
        return {"blocks": copy.deepcopy(member).double().blocks().detach().float().contiguous()}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        blocks = tensors["blocks"]
        return {"type": "block_orthogonal", "block_size": blocks.shape[-1]}, {"skew": skew_of_blocks(blocks)}

    @property
    def fixed(self) -> tuple[int, ...]:
        return self.shapes["blocks"]

    def neutral(self) -> dict[str, Tensor]:
        count, size, _ = self.shapes["blocks"]
        return {"blocks": torch.eye(size).expand(count, size, size).contiguous()}

    def signature(self) -> str:
        return f"BlockOrthogonal{self.shapes['blocks'][1]}"

    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        return blocked(body, x, rank, body.turn(values[0], [0, 2, 1]), self._shape)

    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        return blocked(body, weight, rank, values[0], self._shape)

    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        count, size, _ = self.shapes["blocks"]
        return 2.0 * rows * count * size * size, 4.0 * rows * count * size

    @property
    def _shape(self) -> tuple[int, int, int]:
        count, size, _ = self.shapes["blocks"]
        return count, size, size
