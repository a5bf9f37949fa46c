"""OFT (arXiv 2306.07280, 2506.19847)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import take
from trlora import AdapterSpec, CheckpointError, LayerParts
from trlora.fields import finite_number, positive_int


@final
class Oft:
    """`W' = W0·Rᵀ`, R block-diagonal: the exact Cayley map, whose transpose is ours, or a Neumann series, which is that of
    the transpose, so that the skew matrices change their sign."""

    leaves = ("oft_R.weight",)

    def check(self, config: PeftConfig) -> None:
        pass

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        skew = take(path, tensors, "oft_R.weight", (2,))
        size = (1 + math.isqrt(1 + 8 * skew.shape[1])) // 2
        if size * (size - 1) // 2 != skew.shape[1]:
            raise CheckpointError(
                f"{path}: oft_R.weight has {skew.shape[1]} entries a block, expected b·(b−1)/2 for some block size b"
            )
        if config.flag("coft", False):
            skew = _constrained(skew, finite_number("OFT", "eps", config.fields.get("eps", 6e-5)))
        fields = {"type": "block_orthogonal", "block_size": size, "shared": config.flag("block_share", False)}
        if config.flag("use_cayley_neumann", True):
            terms = positive_int("OFT", "num_cayley_neumann_terms", config.fields.get("num_cayley_neumann_terms", 5))
            fields["neumann_terms"], skew = terms, -skew
        spec = AdapterSpec.from_dict({"transform": fields})
        return LayerParts.from_tensors(path, spec, {"transform": {"skew": skew}})


def _constrained(skew: Tensor, eps: float) -> Tensor:
    """COFT: skew matrices no longer than eps / √(number of blocks), as PEFT projects them whenever it uses them."""
    limit = eps / math.sqrt(len(skew))
    length = math.sqrt(2) * torch.linalg.vector_norm(skew.double(), dim=1, keepdim=True)  # each entry is there twice
    return torch.where(length <= limit, skew.double(), skew.double() * (limit / length)).to(skew.dtype)
