"""Which parts of a UNet the rewrites know."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import nn

_BLOCKS = (CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D)


def unknown_block(unet: UNet2DConditionModel) -> str | None:
    """The class of a block that hands embeddings on in a way the rewrites do not know, None where there is none."""
    blocks = [*unet.down_blocks, *unet.up_blocks, *([unet.mid_block] if unet.mid_block is not None else [])]
    return next((type(block).__name__ for block in blocks if type(block) not in _BLOCKS), None)


def transformer_blocks(unet: nn.Module) -> Iterator[tuple[str, BasicTransformerBlock]]:
    """The transformer blocks with their module paths."""
    for path, module in unet.named_modules():
        if type(module) is BasicTransformerBlock:
            yield path, module


def transformers(unet: nn.Module) -> Iterator[tuple[str, Transformer2DModel]]:
    """The transformers with their module paths."""
    for path, module in unet.named_modules():
        if type(module) is Transformer2DModel:
            yield path, module


def is_silu(module: nn.Module | None) -> bool:
    """Whether an activation is SiLU, in the input's own precision."""
    return type(module) is nn.SiLU


def reason_to_leave(attention: nn.Module) -> str | None:
    """Why an attention is not diffusers' plain one: projections, scaled dot product, output. None where it is."""
    if type(attention) is not Attention:
        return type(attention).__name__
    if type(attention.processor) is not AttnProcessor2_0:
        return type(attention.processor).__name__
    if any(type(layer) is not nn.Linear for layer in (attention.to_q, attention.to_k, attention.to_v)):
        return "projections that are not plain linear layers"
    norms = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
    if any(getattr(attention, name) is not None for name in norms) or attention.added_kv_proj_dim is not None:
        return "normalised or added projections"
    if attention.residual_connection or attention.rescale_output_factor != 1 or attention.is_causal:
        return "a residual, scaled or causal attention"
    if attention.inner_kv_dim != attention.inner_dim or attention.training:
        return "grouped heads or training mode"
    return None
