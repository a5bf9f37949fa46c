"""Group normalisations with the activations behind them."""

from __future__ import annotations

from typing import Any, cast

from diffusers import UNet2DConditionModel
from torch import nn

from trexport.models.fused import known
from trexport.models.fused.norm import GroupNormAct
from trexport.models.fused.options import FuseOptions, Outcome
from trexport.models.fused.resnet import own_resnets_


def fuse_group_norm_(unet: UNet2DConditionModel, options: FuseOptions) -> Outcome:
    """Group normalisations with their activations: those of the resnets, before the transformers, and the last one."""
    left: dict[str, int] = {}
    resnets = own_resnets_(unet, left)
    count = 2 * len(resnets)
    for resnet in resnets.values():
        resnet.norm1.kernels = resnet.norm2.kernels = options.kernels
    for _, transformer in known.transformers(unet):
        norm = getattr(transformer, "norm", None)
        if type(norm) is nn.GroupNorm and norm.affine:
            transformer.norm = cast(Any, GroupNormAct(norm, silu=False, kernels=options.kernels))
            count += 1
    norm = unet.conv_norm_out
    if type(norm) is nn.GroupNorm and norm.affine and known.is_silu(unet.conv_act):
        unet.conv_norm_out = cast(Any, GroupNormAct(norm, silu=True, kernels=options.kernels))
        unet.conv_act = nn.Identity()
        count += 1
    rest = sum(type(module) is nn.GroupNorm for module in unet.modules())
    if rest and not left:
        left["no known place"] = rest
    return Outcome(count, left)
