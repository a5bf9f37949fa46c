"""(IA)³ (arXiv 2205.05638), LyCORIS' way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.peft.method import take
from trlora import AdapterSpec, CheckpointError, LayerParts


@final
class Ia3:
    """`1 + weight` scales every input, or every output without the bias: `on_input` tells which."""

    telling = "on_input"
    leaves = ("weight", "on_input")

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        weight = take(path, tensors, "weight", (1, 2, 4))
        if weight.numel() != max(weight.shape):
            raise CheckpointError(f"{path}: weight has shape {tuple(weight.shape)}, expected one number a channel")
        inside = bool(tensors["on_input"].flatten()[0])
        part = "transform" if inside else "magnitude"
        fields = {"type": "diagonal"} if inside else {"type": "scale", "bias": False}
        kernel = (None, None) if weight.ndim == 4 else ()
        spec = AdapterSpec.from_dict({part: fields})
        return LayerParts.from_tensors(path, spec, {part: {"scale": 1 + weight.flatten()}}, kernel)
