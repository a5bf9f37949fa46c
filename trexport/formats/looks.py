"""Which model an adapter looks to be for, or a base to be: from the names and widths of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trlora import LayerParts

_BY_CONTEXT = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""By the width of what the cross-attention of a UNet reads."""

_BY_NAME = (
    (r"(.*\.)?single_transformer_blocks\.\d+\..*", "Flux"),
    (r"(.*\.)?transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)", "Stable Diffusion 3"),  # Flux has more
    (r"(.*\.)?(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])", "a text encoder"),
    (r"down_blocks\.1\.attentions\.\d\.transformer_blocks\.1\..*", "Stable Diffusion XL"),
    (r"transformer_blocks\.\d+\..*", "Stable Diffusion 3 or Flux"),
    (r"(down_blocks|mid_block|up_blocks)\..*", "a UNet"),
)
_CROSS = re.compile(r".*attn2\.to_[kv]")


def looks_like(widths: Mapping[str, int | None]) -> str | None:
    """The family of models whose layers these are, None where nothing tells.

    Args:
        widths: module path → inputs, None where they are not known.
    """
    contexts = {widths[path] for path in widths if _CROSS.fullmatch(path)}
    for width, name in _BY_CONTEXT.items():
        if contexts == {width}:
            return name
    for pattern, name in _BY_NAME:
        if any(re.fullmatch(pattern, path) for path in widths):
            return name
    return None


def widths_of(layers: Mapping[str, LayerParts]) -> dict[str, int | None]:
    """Of an adapter's layers."""
    return {path: parts.in_features for path, parts in layers.items()}
