"""Attention of fused projections: q, k, v of a self-attention in one product, k, v of all cross-attentions in one product.

A cross-attention's keys and values do not depend on the image, so they are computed where the text enters the UNet, and
what travels through the blocks as `encoder_hidden_states` is all of them side by side.
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from trexport.models.fused import known
from trexport.models.fused.options import FuseOptions, Outcome
from trexport.models.fused.stack import stacked
from trexport.models.rows import Rows

_CUDNN_CHANNELS = 128
"""Of a head. On an H100 cuDNN's kernel takes 0.55 of flash attention's time for 4096 tokens of 40 channels, 0.65 for 1024
of 80, and no less for heads of 160."""
_CUDNN_MULTIPLE = 8
"""Of channels of a head, or cuDNN refuses."""


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, *, cudnn: bool) -> Tensor:
    """`softmax(q·kᵀ / √channels)·v` for each head.

    Args:
        query: (batch, n, heads·channels); any strides but a dense last axis, so views of a fused product too.
        key, value: (batch, m, heads·channels).
        mask: added to the scores, (batch, heads, n or 1, m).
        cudnn: ask for cuDNN's kernel by name. Half precision on CUDA only.

    Returns:
        (batch, n, heads·channels).
    """
    batch, _, width = query.shape
    q, k, v = (tensor.view(batch, -1, heads, width // heads).transpose(1, 2) for tensor in (query, key, value))
    channels = width // heads
    if cudnn and mask is None and channels <= _CUDNN_CHANNELS and channels % _CUDNN_MULTIPLE == 0:
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, -1, width)


def _finish(attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, cudnn: bool) -> Tensor:
    if mask is not None:
        batch, tokens, _ = key.shape
        mask = attn.prepare_attention_mask(mask, tokens, batch).view(batch, attn.heads, -1, tokens)
    assert attn.to_out is not None
    return attn.to_out[0](attend(query, key, value, attn.heads, mask, cudnn=cudnn))


@final
class SelfProcessor:
    """Of an attention that has `to_qkv`."""

    def __init__(self, *, cudnn: bool) -> None:
        self._cudnn = cudnn

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return _finish(attn, query, key, value, attention_mask, cudnn=self._cudnn)


@final
class CrossProcessor:
    """Of an attention whose keys and values are columns of `encoder_hidden_states`."""

    def __init__(self, first: int, width: int, *, cudnn: bool) -> None:
        self._first = first
        self._width = width
        self._cudnn = cudnn

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        key = encoder_hidden_states.narrow(-1, self._first, self._width)
        value = encoder_hidden_states.narrow(-1, self._first + self._width, self._width)
        return _finish(attn, attn.to_q(hidden_states), key, value, attention_mask, cudnn=self._cudnn)


def fuse_self_attention_(unet: UNet2DConditionModel, options: FuseOptions) -> Outcome:
    """q, k, v of every self-attention in one product, `to_qkv`."""
    placements: dict[str, Rows] = {}
    left: dict[str, int] = {}
    count = 0
    for parent, block in known.transformer_blocks(unet):
        for name in ("attn1", "attn2"):
            attention = getattr(block, name)
            if attention is None or attention.is_cross_attention:
                continue
            reason = known.reason_to_leave(attention)
            if name == "attn2":  # it is called with the text, whose width happens to be the image's
                reason = reason or "a second self-attention"
            if reason is not None:
                left[reason] = left.get(reason, 0) + 1
                continue
            path = f"{parent}.{name}"
            layers = {f"{path}.{part}": getattr(attention, part) for part in ("to_q", "to_k", "to_v")}
            attention.to_qkv, rows = stacked(layers, f"{path}.to_qkv")
            attention.to_q = attention.to_k = attention.to_v = None
            attention.set_processor(cast(Any, SelfProcessor(cudnn=options.attention == "cudnn")))
            placements |= rows
            count += 1
    return Outcome(count, left, placements)


def fuse_cross_attention_(unet: UNet2DConditionModel, options: FuseOptions) -> Outcome:
    """k, v of all cross-attentions in one product, `encoder_hid_proj`: of all or of none, for all get what it makes."""
    crossing: dict[str, Attention] = {}
    for parent, block in known.transformer_blocks(unet):
        for name in ("attn1", "attn2"):
            attention = getattr(block, name)
            if attention is not None and attention.is_cross_attention:
                crossing[f"{parent}.{name}"] = attention
    reason = _reason_to_leave(unet, crossing)
    if reason is not None:
        return Outcome(0, {reason: len(crossing)})
    layers: dict[str, nn.Linear] = {}
    for path, attention in crossing.items():
        layers |= {f"{path}.to_k": attention.to_k, f"{path}.to_v": attention.to_v}  # type: ignore[dict-item]
    unet.encoder_hid_proj, placements = stacked(layers, "encoder_hid_proj")
    unet.register_to_config(encoder_hid_dim_type="text_proj")  # where diffusers projects the text before all blocks
    for path, attention in crossing.items():
        key = placements[f"{path}.to_k"]
        attention.to_k = attention.to_v = None
        attention.set_processor(cast(Any, CrossProcessor(key.first, key.rows, cudnn=options.attention == "cudnn")))
    return Outcome(len(crossing), {}, placements)


def _reason_to_leave(unet: UNet2DConditionModel, crossing: dict[str, Attention]) -> str | None:
    unknown = known.unknown_block(unet)
    if unknown is not None:
        return unknown
    if unet.encoder_hid_proj is not None or unet.config["encoder_hid_dim_type"] is not None:
        return "a projection of the text already"
    if any(block.double_self_attention for _, block in known.transformer_blocks(unet)):
        return "a second self-attention"
    others = [
        module for _, module in unet.named_modules() if isinstance(module, Attention) and module.is_cross_attention
    ]
    if len(others) != len(crossing):
        return "a cross-attention outside of the transformer blocks"
    if any(not transformer.is_input_continuous for _, transformer in known.transformers(unet)):
        return "a transformer of discrete inputs or patches"
    if len({(attention.to_k.in_features, attention.to_k.bias is None) for attention in crossing.values()}) > 1:  # type: ignore[union-attr]
        return "texts of several widths"
    return next(filter(None, (known.reason_to_leave(attention) for attention in crossing.values())), None)
