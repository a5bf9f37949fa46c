# pyright: reportMissingImports=false, reportIndexIssue=false
# (Triton is not installed on machines without a GPU)
"""Matrix products that finish in the tile's registers what would be a pass of its own: a residual's sum, a gated GELU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (128, 64, 64, 8, 4),
        (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
    )
]
"""What is tried on the device when the program is compiled; the fastest stays."""
_TOGETHER = 8
"""Blocks of rows that take a block of the weight one after another, while it is in the cache."""


@triton.jit
def linear_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    rows,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x (rows, DEPTH), weight (WIDTH or, GATED, 2·WIDTH, DEPTH), residual and out (rows, WIDTH), all dense."""
    program = tl.program_id(0)
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    down = tl.cdiv(rows, BLOCK_M)
    of_group = TOGETHER * across
    first = program // of_group * TOGETHER
    high = tl.minimum(down - first, TOGETHER)
    block_m = first + program % of_group % high
    block_n = program % of_group // high
    lines = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depths = tl.arange(0, BLOCK_K)
    # out of the way of masks: what is there twice is not written
    safe_lines = tl.minimum(lines, rows - 1)
    safe_columns = tl.minimum(columns, WIDTH - 1)
    left = x + safe_lines[:, None].to(tl.int64) * DEPTH + depths[None, :]
    right = weight + safe_columns[None, :] * DEPTH + depths[:, None]
    values = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    gates = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(left + start)
            b = tl.load(right + start)
        else:
            a = tl.load(left + start, mask=(start + depths < DEPTH)[None, :], other=0.0)
            b = tl.load(right + start, mask=(start + depths < DEPTH)[:, None], other=0.0)
        values = tl.dot(a, b, values)
        if GATED:
            if DEPTH % BLOCK_K == 0:
                c = tl.load(right + WIDTH * DEPTH + start)
            else:
                c = tl.load(right + WIDTH * DEPTH + start, mask=(start + depths < DEPTH)[:, None], other=0.0)
            gates = tl.dot(a, c, gates)
    if HAS_BIAS:
        values += tl.load(bias + safe_columns).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            gates += tl.load(bias + WIDTH + safe_columns).to(tl.float32)[None, :]
        values *= 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    mask = (lines < rows)[:, None] & (columns < WIDTH)[None, :]
    places = lines[:, None].to(tl.int64) * WIDTH + columns[None, :]
    if HAS_RESIDUAL:
        values += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, values.to(out.dtype.element_ty), mask=mask)


_tuned = triton.autotune(_CONFIGS, key=["rows", "WIDTH", "DEPTH", "GATED"])(linear_kernel)
FORCED: triton.Config | None = None
"""One of the configurations, where nothing is tried: tests without a GPU."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, gated: bool) -> Tensor:
    """The functions of `trexport.models.fused.ops`, for float16 and bfloat16 on CUDA."""
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    depth = weight.shape[1]
    given = x.contiguous().view(-1, depth)
    rows = given.shape[0]
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    sizes: dict[str, Any] = {
        "WIDTH": width,
        "DEPTH": depth,
        "GATED": gated,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "TOGETHER": _TOGETHER,
    }
    arguments = (
        given,
        weight,
        # in the place of what is not there stands something that is never touched
        weight if bias is None else bias,
        weight if residual is None else residual.contiguous(),
        out,
        rows,
    )
    if FORCED is not None:
        blocks = triton.cdiv(rows, FORCED.kwargs["BLOCK_M"]) * triton.cdiv(width, FORCED.kwargs["BLOCK_N"])
        linear_kernel[(blocks,)](*arguments, **sizes, **FORCED.kwargs)
        return out

    def grid(meta: dict[str, Any]) -> tuple[Any]:
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)

    wrap_triton(_tuned)[grid](*arguments, **sizes)
    return out
