"""GLoRA (arXiv 2306.07967)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.kohya.method import alpha_of
from trexport.formats.kohya.mid import with_mid
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, CheckpointError, LayerParts


@final
class Glora:
    """`W' = W0·(I + (alpha / r)·a1·a2) + (alpha / r)·b1·b2`; of a convolution a1 and a2 mix its channels, b2 has its kernel,
    or `bm` between b1 and b2."""

    telling = "a1.weight"
    leaves = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha")

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        b2 = take(path, tensors, "b2.weight", (2, 4))
        taken = {leaf: take(path, tensors, leaf, (b2.ndim,)) for leaf in ("a1.weight", "a2.weight", "b1.weight")}
        for leaf, tensor in taken.items():
            if kernel_of(tensor).count(1) != tensor.ndim - 2:
                raise CheckpointError(f"{path}: {leaf} has shape {tuple(tensor.shape)}, expected a kernel of 1×1")
        b2, kernel = with_mid(path, tensors, "b1.weight", "b2.weight", "bm.weight")
        rank = taken["a2.weight"].shape[0]
        alpha = alpha_of(path, tensors, rank)
        fields = {"type": "low_rank", "rank": rank, "alpha": alpha}
        spec = AdapterSpec.from_dict({"transform": fields, "residual": fields})
        parts = {
            "transform": {
                "lora_A.weight": taken["a2.weight"].flatten(1),
                "lora_B.weight": taken["a1.weight"].flatten(1),
            },
            "residual": {"lora_A.weight": b2.flatten(1), "lora_B.weight": taken["b1.weight"].flatten(1)},
        }
        return LayerParts.from_tensors(path, spec, parts, kernel)
