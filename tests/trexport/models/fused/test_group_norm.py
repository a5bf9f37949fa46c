"""The Triton kernels against float64 torch: on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: the kernels are not tested here")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what one kernel does, and what takes two: rectangles, groups of odd widths, rows that fill no tile
SHAPES = {
    "whole": (2, 48, 5, 7, 4),
    "wide": (1, 320, 4, 6, 32),
    "split": (2, 60, 35, 41, 6),
    "three": (1, 90, 40, 41, 6),
}
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


def oracle(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, silu: bool) -> Tensor:
    wide = x.double() if shift is None else x.double() + shift.double()[:, :, None, None]
    wide = F.group_norm(wide, groups, weight.double(), bias.double(), 1e-5)
    return F.silu(wide) if silu else wide


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("extra", ["none", "shift", "silu", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_group_norm(shape: tuple[int, ...], extra: str, dtype: torch.dtype) -> None:
    from trexport.models.fused.kernels.group_norm import group_norm

    batch, channels, height, width, groups = shape
    # a mean far from zero, and groups that differ
    x = torch.randn(batch, channels, height, width) * 2 + 20 * torch.linspace(-1, 1, channels)[:, None, None]
    x = x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, device=DEVICE).to(dtype)
    # columns of something wider, as those of all blocks' shifts
    shift = torch.randn(batch, channels + 24, device=DEVICE).to(dtype)[:, 8 : channels + 8]
    moved = shift if extra in ("shift", "both") else None
    silu = extra in ("silu", "both")
    found = group_norm(x, moved, weight, bias, groups, 1e-5, silu)
    wanted = oracle(x, moved, weight, bias, groups, silu)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found.double() - wanted).norm() / wanted.norm()) < ROUNDING[dtype]


@pytest.mark.parametrize("shape", [SHAPES["whole"], SHAPES["split"]])
def test_a_mean_a_thousand_times_the_deviation_costs_no_digits(shape: tuple[int, ...]) -> None:
    from trexport.models.fused.kernels.group_norm import group_norm

    batch, channels, height, width, groups = shape
    x = (torch.randn(batch, channels, height, width) + 1000).to(DEVICE)
    ones = torch.ones(channels, device=DEVICE)
    found = group_norm(x, None, ones, 0 * ones, groups, 1e-5, False)
    wanted = oracle(x, None, ones, 0 * ones, groups, False)
    # float32 keeps 1000 + z to 6e-5, and the mean to a few of those; E[x²] − E[x]² would be wrong by 0.06 and more
    assert float((found.double() - wanted).abs().max()) < 5e-4


def test_other_layouts_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from trexport.models.fused.kernels import group_norm as kernels

    x = torch.randn(2, 12, 9, 5, device=DEVICE)
    weight, bias = torch.randn(2, 12, device=DEVICE)
    wanted = oracle(x, None, weight, bias, 3, True)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        found = kernels.group_norm(given, None, weight, bias, 3, 1e-5, True)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6
        monkeypatch.setattr(kernels, "_WHOLE", 0)
        found = kernels.group_norm(given, None, weight, bias, 3, 1e-5, True)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6
        monkeypatch.undo()


def test_few_lanes_of_a_tile_are_idle() -> None:
    from trexport.models.fused.kernels.group_norm import groups_together

    for width in (10, 20, 30, 40, 60):  # of all maps of SD1.5 but those of 2560 channels
        lanes = groups_together(32, width) * width
        assert lanes / 128 > 0.9, width
    assert groups_together(4, 3) == 4
    assert groups_together(32, 200) == 1
