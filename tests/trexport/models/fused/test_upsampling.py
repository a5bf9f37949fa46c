"""Upsampling folded into its convolution, against torch's own two steps."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional as F

from tests.trexport.models.fused.test_fused import EXACT, TINY, drawn, made
from trexport.models.fused import FuseOptions, fuse_
from trexport.models.fused.upsampling import FoldedUpsample


def module_of(channels: int, out: int, bias: bool, dtype: torch.dtype) -> Upsample2D:
    torch.manual_seed(0)
    module = Upsample2D(channels, use_conv=True, out_channels=out, bias=bias)
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "out", "height", "width"), [(3, 5, 4, 7), (6, 2, 1, 3), (4, 4, 2, 1)])
def test_it_is_the_two_steps(channels: int, out: int, height: int, width: int, bias: bool) -> None:
    module = module_of(channels, out, bias, torch.float64)
    assert module.conv is not None
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    wanted = F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), module.conv.weight, module.conv.bias, padding=1
    )
    got = FoldedUpsample(module.conv)(x, (2 * height, 2 * width))
    assert float((got - wanted).norm() / wanted.norm()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_added_before_they_are_rounded(dtype: torch.dtype) -> None:
    module = module_of(32, 48, True, dtype)
    assert module.conv is not None
    x = torch.randn(1, 32, 6, 5).to(dtype)
    wanted = module.double()(x.double())
    got = FoldedUpsample(module.to(dtype).conv).double()(x.double())
    assert float((got - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps


def test_another_size_is_refused() -> None:
    module = module_of(3, 3, True, torch.float32)
    with pytest.raises(ValueError, match="4×6 to be made"):
        FoldedUpsample(module.conv)(torch.zeros(1, 3, 4, 6), (7, 12))


def test_a_convolution_whose_weight_is_replaced_stays() -> None:
    model = made(TINY)
    wanted = drawn(model, TINY)
    path = "up_blocks.0.upsamplers.0.conv"
    weight = model.get_submodule(path).weight
    outcome = fuse_(model, FuseOptions(("upsampling",), replaceable=frozenset({path}))).outcomes["upsampling"]
    assert (outcome.replaced, sum(outcome.left.values())) == (0, 1)
    assert model.get_submodule(path).weight is weight
    assert fuse_(model, FuseOptions(("upsampling",))).outcomes["upsampling"].replaced == 1
    assert float((drawn(model, TINY) - wanted).norm() / wanted.norm()) < EXACT
