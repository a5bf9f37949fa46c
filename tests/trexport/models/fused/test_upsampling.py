"""Upsampling folded into its convolution, against torch's own two steps."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from tests.trexport.models.fused.test_fused import EXACT, SIZES, TINY, drawn, made
from trexport.models.architectures import spec_of
from trexport.models.fused import ALL, FuseOptions, fuse_
from trexport.models.fused.upsampling import FoldedUpsample
from trexport.models.model import first_output, random_feeds


def modules_of(channels: int, out: int, bias: bool, dtype: torch.dtype) -> tuple[Upsample2D, nn.Conv2d]:
    """An upsampling, and its convolution."""
    torch.manual_seed(0)
    module = Upsample2D(channels, use_conv=True, out_channels=out, bias=bias).to(dtype).requires_grad_(False)
    assert isinstance(module.conv, nn.Conv2d)
    return module, module.conv


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "out", "height", "width"), [(3, 5, 4, 7), (6, 2, 1, 3), (4, 4, 2, 1)])
def test_it_is_the_two_steps(channels: int, out: int, height: int, width: int, bias: bool) -> None:
    _, convolution = modules_of(channels, out, bias, torch.float64)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    great = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = F.conv2d(great, convolution.weight, convolution.bias, padding=1)
    got = FoldedUpsample(convolution)(x, (2 * height, 2 * width))
    assert float((got - wanted).norm() / wanted.norm()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_added_before_they_are_rounded(dtype: torch.dtype) -> None:
    module, convolution = modules_of(32, 48, True, dtype)
    folded = FoldedUpsample(convolution).double()
    x = torch.randn(1, 32, 6, 5).double()
    wanted, got = module.double()(x), folded(x)
    assert float((got - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps


def test_another_size_is_refused() -> None:
    _, convolution = modules_of(3, 3, True, torch.float32)
    with pytest.raises(ValueError, match="4×6 to be made"):
        FoldedUpsample(convolution)(torch.zeros(1, 3, 4, 6), (7, 12))


def test_sizes_that_no_power_of_two_divides_are_taken_without_it() -> None:
    model = made(TINY)
    feeds = random_feeds(spec_of(TINY, "fp32"), SIZES | {"height": 9, "width": 7})
    wide = {name: tensor.double() for name, tensor in feeds.items()}
    with torch.inference_mode():
        wanted = first_output(model, wide)
        fuse_(model, FuseOptions(tuple(name for name in ALL if name != "upsampling")))
        got = first_output(model, wide)
    assert float((got - wanted).norm() / wanted.norm()) < EXACT


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_weight_keeps_its_layout(layout: torch.memory_format) -> None:
    """One in another layout than the map's is turned in every step."""
    _, convolution = modules_of(6, 5, True, torch.float32)
    folded = FoldedUpsample(convolution.to(memory_format=layout))  # type: ignore[call-overload]
    assert folded.conv.weight.is_contiguous(memory_format=layout)


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
