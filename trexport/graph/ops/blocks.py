"""Products with blocks on a diagonal, which several transforms are made of."""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.ops.body import Body, batched


def blocked(body: Body, value: ir.Value, rank: int, blocks: ir.Value, shape: tuple[int, int, int]) -> ir.Value:
    """`value @ blockdiag(blocks)` along the last axis.

    Args:
        value: of `rank` dimensions; where the body is stacked, (stack, rows, features) or (rows, features).
        blocks: of `shape` (n_blocks, b, b), float32; in a stacked body with a leading axis.
    """
    count, size, _ = shape
    parted = body.reshape(value, batched(rank, [count, 1, size]))
    if body.stacked:  # (stack, rows, blocks, 1, b)
        blocks, rank = body.fold(blocks, [1, count, size, size]), 3
    return body.reshape(body.matmul(parted, body.narrow(blocks)), batched(rank, [count * size]))
