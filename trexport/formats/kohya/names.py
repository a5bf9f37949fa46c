"""Module paths whose dots were written as underscores: kohya's names, of diffusers' UNets and of the original ones."""

from __future__ import annotations

import re

_WHOLE = (
    "add_embedding",
    "conv_in",
    "conv_norm_out",
    "conv_out",
    "conv_shortcut",
    "down_blocks",
    "encoder_hid_proj",
    "linear_1",
    "linear_2",
    "mid_block",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    "time_embedding",
    "to_add_out",
    "to_k",
    "to_out",
    "to_q",
    "to_v",
    "transformer_blocks",
    "up_blocks",
)
"""Names of modules with underscores of their own."""
_TOKEN = re.compile("|".join([*(rf"{name}(?=_|$)" for name in _WHOLE), r"[^_]+"]))

_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Parts of an original residual block."""
_TOP = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_\d+_(.+)|middle_block_(\d+)_(.+)")
_A_BLOCK = 3
"""Entries of an original UNet for each of diffusers' blocks, which have two layers, of Stable Diffusion 1.x, 2.x and XL:
input blocks with the downsampler, output blocks with a third layer."""


def dotted(name: str) -> str:
    """`down_blocks_0_attentions_1_proj_in`, or `input_blocks_2_1_proj_in` → `down_blocks.0.attentions.1.proj_in`."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return ".".join(_TOKEN.findall(name))
    side, number, rest, middle, inner = match.groups()
    if side is None:
        where, layer, rest = "mid_block", int(middle) // 2, inner
    elif side == "input_blocks":
        block, layer = divmod(int(number) - 1, _A_BLOCK)
        where = f"down_blocks.{block}"
    else:
        block, layer = divmod(int(number), _A_BLOCK)
        where = f"up_blocks.{block}"
    if rest in _RESNET:
        return f"{where}.resnets.{layer}.{_RESNET[rest]}"
    if rest == "op":
        return f"{where}.downsamplers.0.conv"
    if rest == "conv":
        return f"{where}.upsamplers.0.conv"
    return f"{where}.attentions.{0 if side is None else layer}.{'.'.join(_TOKEN.findall(rest))}"
