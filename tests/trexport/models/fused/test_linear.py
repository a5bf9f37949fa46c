"""The product with its endings against float64 torch: on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed: the kernel is not tested here")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float16: 5e-4}
if DEVICE == "cuda":
    ROUNDING[torch.bfloat16] = 4e-3  # the interpreter takes its bits for integers
# rows, in, out: rectangles that fill no tile, a depth that is no multiple of a block, more blocks of rows than go together
SHAPES = [(50, 40, 24), (33, 64, 70), (300, 32, 16)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", ["nothing", "bias", "residual", "both", "gated", "gated bias"])
def test_it_is_the_product(
    monkeypatch: pytest.MonkeyPatch, extra: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    import triton  # pyright: ignore[reportMissingImports]

    from trexport.models.fused.kernels import linear

    config = triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4)
    monkeypatch.setattr(linear, "FORCED", config)
    rows, depth, width = shape
    gated = "gated" in extra
    x = torch.randn(2, rows // 2 if rows % 2 == 0 else rows, depth, device=DEVICE).to(dtype)
    weight = torch.randn(2 * width if gated else width, depth, device=DEVICE).to(dtype)
    bias = torch.randn(len(weight), device=DEVICE).to(dtype) if extra in ("bias", "both", "gated bias") else None
    residual = torch.randn(*x.shape[:2], width, device=DEVICE).to(dtype) if extra in ("residual", "both") else None
    found = linear.product(x, weight, bias, residual, gated=gated)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        values, gates = wanted.chunk(2, -1)
        wanted = values * F.gelu(gates)
    if residual is not None:
        wanted = wanted + residual.double()
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).norm() / wanted.norm()) < ROUNDING[dtype]
