"""The time embedding of all residual blocks in one product a step."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from trexport.models.fused import known
from trexport.models.fused.options import FuseOptions, Outcome
from trexport.models.fused.resnet import own_resnets_
from trexport.models.fused.stack import linear_of, stacked

_NAME = "time_embed_act"


def fuse_time_embedding_(unet: UNet2DConditionModel, options: FuseOptions) -> Outcome:
    """One product where diffusers applies an activation to the time embedding, `time_embed_act`; what travels through the
    blocks as `temb` is the shifts of all residual blocks side by side. Of all blocks or of none.

    The bias of each block's first convolution is added to its shift (`conv(x) + b + s = conv(x) + (b + s)`), so that the
    convolution needs no addition of its own.
    """
    unknown = known.unknown_block(unet)
    if unknown is not None:
        return Outcome(0, {unknown: sum(isinstance(module, ResnetBlock2D) for module in unet.modules())})
    left: dict[str, int] = {}
    resnets = own_resnets_(unet, left)
    if left or not resnets:
        return Outcome(0, left)
    layers = {f"{path}.time_emb_proj": resnet.time_emb_proj for path, resnet in resnets.items()}
    if any(type(layer) is not nn.Linear or layer.bias is None for layer in layers.values()):
        return Outcome(0, {"projections that are not plain linear layers": len(layers)})
    projection, placements = stacked(layers, f"{_NAME}.projection")  # type: ignore[arg-type]
    wide = torch.promote_types(projection.bias.dtype, torch.float32)
    bias = projection.bias.to(wide)
    for path, resnet in resnets.items():
        rows = placements[f"{path}.time_emb_proj"]
        resnet.time_columns = (rows.first, rows.rows)
        resnet.time_emb_proj = None
        if resnet.conv1.bias is not None:
            bias[rows.first : rows.first + rows.rows] += resnet.conv1.bias.to(wide)
            resnet.conv1.bias = None
    projection = linear_of(projection.weight.detach(), bias.to(projection.weight.dtype))
    before = [("before", unet.time_embed_act)] if unet.time_embed_act is not None else []
    steps = nn.Sequential()
    for name, module in [*before, ("silu", nn.SiLU()), ("projection", projection)]:
        steps.add_module(name, module)
    unet.time_embed_act = steps
    return Outcome(len(resnets), {}, placements)
