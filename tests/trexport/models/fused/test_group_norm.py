"""The Triton kernels against float64 torch: on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: the kernels are not tested here")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rectangles, groups of odd widths, rows that fill no tile
SHAPES = {
    "small": (2, 48, 5, 7, 4),
    "narrow": (1, 96, 4, 6, 32),
    "large": (2, 18, 17, 21, 3),
}
WAYS = ("own choice", "in registers", "two passes", "two kernels")
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}
JOINS = {
    "shift": ("shift",),
    "skip+bias": ("skip", "bias"),
    "other": ("other",),
    "all": ("skip", "bias", "other"),
}


def oracle(joined: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool) -> Tensor:
    wide = F.group_norm(joined.double(), groups, weight.double(), bias.double(), 1e-5)
    return F.silu(wide) if silu else wide


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With a mean far from zero, and groups that differ."""
    batch, channels, height, width = shape[:4]
    x = torch.randn(batch, channels, height, width) * 2 + 20 * torch.linspace(-1, 1, channels)[:, None, None]
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def force(monkeypatch: pytest.MonkeyPatch, way: str, shape: tuple[int, ...]) -> None:
    from trexport.models.fused.kernels import group_norm as kernels

    _, channels, height, width, groups = shape
    rows = 2 ** (height * width - 1).bit_length()
    together = kernels.groups_together(groups, channels // groups, 32)
    tilings: dict[str, Any] = {
        "own choice": None,
        "in registers": kernels.Tiling(rows, together, 4, in_registers=True),
        "two passes": kernels.Tiling(16, together, 4),
        "two kernels": kernels.Tiling(32, together, 4, splits=8),
    }
    monkeypatch.setattr(kernels, "FORCED", tilings[way])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("way", "dtype"),
    [*((way, torch.float16) for way in WAYS), (WAYS[0], torch.float32), (WAYS[0], torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_group_norm(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], way: str, dtype: torch.dtype
) -> None:
    from trexport.models.fused.kernels.group_norm import normalised

    batch, channels, _, _, groups = shape
    x = drawn(shape, dtype)
    weight, bias = torch.randn(2, channels, device=DEVICE).to(dtype)
    # columns of something wider, as those of all blocks' shifts
    shift = torch.randn(batch, channels + 24, device=DEVICE).to(dtype)[:, 8 : channels + 8]
    force(monkeypatch, way, shape)
    for moved, silu in ((None, True), (shift, True), (shift, False)):
        _, found = normalised(x, None, moved, None, weight, bias, groups, 1e-5, silu, keep=False)
        joined = x if moved is None else x.double() + moved.double()[:, :, None, None]
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert relative(found, oracle(joined, weight, bias, groups, silu)) < ROUNDING[dtype]


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_before_it_is_joined(monkeypatch: pytest.MonkeyPatch, way: str, join: tuple[str, ...]) -> None:
    from trexport.models.fused.kernels.group_norm import normalised

    dtype = torch.float16
    shape = SHAPES["large"]
    batch, channels, height, width, groups = shape
    first = channels - channels // 4 + 2 if "other" in join else channels  # in the middle of a group
    x, skip = drawn((batch, first, height, width), dtype), drawn((batch, first, height, width), dtype)
    other = drawn((batch, channels - first, height, width), dtype) if "other" in join else None
    weight, bias = torch.randn(2, channels, device=DEVICE).to(dtype)
    shift = None
    sum_ = x.double()
    if "skip" in join:
        sum_ = sum_ + skip.double()
    if "bias" in join:
        shift = torch.randn(first, device=DEVICE).to(dtype)
        sum_ = sum_ + shift.double()[:, None, None]
    if "shift" in join:
        shift = torch.randn(batch, first + 5, device=DEVICE).to(dtype)[:, 5:]
        sum_ = sum_ + shift.double()[:, :, None, None]
    wanted = sum_ if other is None else torch.cat([sum_, other.double()], 1)
    force(monkeypatch, way, shape)
    joined, found = normalised(
        x, skip if "skip" in join else None, shift, other, weight, bias, groups, 1e-5, True, keep=True
    )
    assert joined is not None
    assert torch.equal(joined, wanted.float().to(dtype)) or relative(joined, wanted) < 3e-4
    # of what is kept, which is what the next layers see
    assert relative(found, oracle(joined, weight, bias, groups, True)) < ROUNDING[dtype]


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_mean_a_thousand_times_the_deviation_costs_no_digits(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from trexport.models.fused.kernels.group_norm import normalised

    shape = SHAPES["large"]
    batch, channels, height, width, groups = shape
    x = (torch.randn(batch, channels, height, width) + 1000).to(DEVICE)
    ones = torch.ones(channels, device=DEVICE)
    force(monkeypatch, way, shape)
    _, found = normalised(x, None, None, None, ones, 0 * ones, groups, 1e-5, False, keep=False)
    wanted = oracle(x, ones, 0 * ones, groups, False)
    # float32 keeps 1000 + z to 6e-5, and the mean to a few of those; E[x²] − E[x]² would be wrong by 0.06 and more
    assert float((found.double() - wanted).abs().max()) < 5e-4


@pytest.mark.parametrize("way", WAYS[1:])
def test_other_layouts_are_taken(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from trexport.models.fused.kernels.group_norm import normalised

    shape = (2, 12, 9, 5, 3)
    x = torch.randn(shape[:4], device=DEVICE)
    weight, bias = torch.randn(2, 12, device=DEVICE)
    wanted = oracle(x, weight, bias, 3, True)
    force(monkeypatch, way, shape)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        _, found = normalised(given, None, None, None, weight, bias, 3, 1e-5, True, keep=False)
        assert relative(found, wanted) < 1e-6


def test_few_lanes_of_a_tile_are_idle() -> None:
    from trexport.models.fused.kernels.group_norm import groups_together

    for width in (10, 20, 30, 40, 60):  # of all maps of SD1.5 but those of 2560 channels
        lanes = groups_together(32, width, 128) * width
        assert lanes / 128 > 0.9, width
    assert groups_together(4, 3, 128) == 4
    assert groups_together(32, 200, 128) == 1


def test_every_tile_fits_and_holds_all_rows_where_it_says_so() -> None:
    from trexport.models.fused.kernels.group_norm import tiling

    for batch in (1, 2, 8):
        for channels in (320, 640, 960, 1280, 1920, 2560):
            for side in (8, 16, 32, 64, 96, 128):
                how = tiling(batch, side * side, 32, channels // 32)
                assert how.rows & (how.rows - 1) == 0
                assert how.rows * how.together * channels // 32 <= 65536
                assert not how.in_registers or how.rows >= side * side
