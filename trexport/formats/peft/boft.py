"""BOFT (arXiv 2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import take
from trlora import AdapterSpec, CheckpointError, LayerParts
from trlora.cayley import upper_of


@final
class Boft:
    """`W' = diag(boft_s)·W0·T`, T a butterfly of orthogonal blocks from the skew parts of `boft_R` (m, n_blocks, b, b).
    `boft_s` is (out, 1) of a linear layer, (1, out) of a convolution."""

    leaves = ("boft_R", "boft_s")

    def check(self, config: PeftConfig) -> None:
        pass

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        blocks = take(path, tensors, "boft_R", (4,))
        scale = take(path, tensors, "boft_s", (2,))
        factors, _, size, other = blocks.shape
        if size != other or 1 not in scale.shape:
            raise CheckpointError(
                f"{path}: boft_R has shape {tuple(blocks.shape)} and boft_s {tuple(scale.shape)}, expected square blocks, "
                "and one scale for each output"
            )
        kernel = None if scale.numel() == 1 else () if scale.shape[1] == 1 else (None, None)
        fields = {
            "transform": {"type": "butterfly", "block_size": size, "factors": factors},
            "magnitude": {"type": "scale", "bias": False},
        }
        wide = blocks.double()
        skew = upper_of((wide - wide.transpose(-1, -2)) / 2).to(blocks.dtype)
        parts = {"transform": {"skew": skew}, "magnitude": {"scale": scale.flatten()}}
        return LayerParts.from_tensors(path, AdapterSpec.from_dict(fields), parts, kernel)
