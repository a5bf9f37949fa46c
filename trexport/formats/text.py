"""Parts of an adapter that are for text encoders: names of modules, and what to say of them where they are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trlora import Adapter

_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Of projections, as diffusers' first LoRAs had them for every attention."""
_WHOLE = (
    "final_layer_norm",
    "k_proj",
    "layer_norm1",
    "layer_norm2",
    "out_proj",
    "position_embedding",
    "q_proj",
    "self_attn",
    "text_model",
    "text_projection",
    "token_embedding",
    "v_proj",
)
"""Names of CLIP's modules with underscores of their own."""
_TOKEN = re.compile("|".join([*(rf"{name}(?=_|$)" for name in _WHOLE), r"[^_]+"]))


def dotted_text(name: str) -> str:
    """`text_model_encoder_layers_0_self_attn_q_proj` → `text_model.encoder.layers.0.self_attn.q_proj`."""
    return ".".join(_TOKEN.findall(name))


def projection_name(path: str) -> str:
    """The path of a text encoder's module, `….self_attn.to_q` of old files as `….self_attn.q_proj`."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{_OLD_NAMES[leaf]}" if leaf in _OLD_NAMES else path


def left_out(components: Mapping[str, Adapter]) -> str:
    """What to say of components whose parts are not taken."""
    counts = {name: len(adapter.layers) + len(adapter.offsets) for name, adapter in sorted(components.items())}
    return ", ".join(f"adapters of {count} layers of {name}" for name, count in counts.items()) + " are left out"
