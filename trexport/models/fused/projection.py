"""The transformers' 1×1 convolutions as linear layers: a channels-last map is a matrix of tokens already, and a matrix
product takes the bias along."""

from __future__ import annotations

from typing import Any, cast

from diffusers import UNet2DConditionModel
from torch import nn

from trexport.models.fused import known
from trexport.models.fused.options import FuseOptions, Outcome
from trexport.models.fused.stack import linear_of

_NAMES = ("proj_in", "proj_out")
_OTHER = "projections that are no plain 1×1 convolutions"


def fuse_projection_(unet: UNet2DConditionModel, options: FuseOptions) -> Outcome:
    """`proj_in` and `proj_out` as products, as of models with `use_linear_projection`, under their names."""
    left: dict[str, int] = {}
    count = 0
    for _, transformer in known.transformers(unet):
        layers = [getattr(transformer, name, None) for name in _NAMES]
        if not transformer.is_input_continuous or transformer.use_linear_projection:
            continue
        if not all(_is_pointwise(layer) for layer in layers):
            left[_OTHER] = left.get(_OTHER, 0) + 1
            continue
        for name, layer in zip(_NAMES, layers, strict=True):
            convolution = cast(nn.Conv2d, layer)
            bias = None if convolution.bias is None else convolution.bias.detach()
            setattr(transformer, name, cast(Any, linear_of(convolution.weight.detach().flatten(1), bias)))
        transformer.use_linear_projection = True
        count += 1
    return Outcome(count, left)


def _is_pointwise(layer: nn.Module | None) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and layer.in_channels == layer.out_channels
    )
