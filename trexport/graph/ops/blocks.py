"""Products with blocks on a diagonal, which several transforms are made of."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from trexport.errors import ArtifactError
from trexport.graph.ops.body import Body, batched
from trlora.cayley import cayley, inverse_cayley, upper_of

_ROUNDING = 1e-5
"""Of blocks in float32, and of what their skew matrices give again."""


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


def skew_of_blocks(blocks: Tensor) -> Tensor:
    """The entries above the diagonal of the skew matrices whose Cayley maps the blocks (…, b, b) are, (…, b·(b−1)/2).

    Raises:
        ArtifactError: some are not orthogonal, such as those of a Neumann series, or turn something by half a circle.
    """
    skew = inverse_cayley(blocks.double())
    error = float((cayley(skew) - blocks.double()).abs().max())
    if not error <= _ROUNDING:
        raise ArtifactError(f"blocks that no Cayley map gives (nearest within {error:.1e}): a Neumann series' are such")
    return upper_of(skew).to(blocks.dtype)
