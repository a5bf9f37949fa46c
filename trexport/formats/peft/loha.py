"""LoHa (arXiv 2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, LayerParts

_PAIRS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@final
class Loha:
    """`W' = W0 + (alpha / r)·(A1·B1) ⊙ (A2·B2)`, of convolutions also in Tucker form."""

    leaves = (*_PAIRS, *_CORES)

    def check(self, config: PeftConfig) -> None:
        pass

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        taken = {leaf: take(path, tensors, leaf, (2,)) for leaf in _PAIRS}
        kernel: tuple[int, ...] | None = None
        if any(leaf in tensors for leaf in _CORES):
            taken |= {leaf: take(path, tensors, leaf, (4,)) for leaf in _CORES}
            kernel = kernel_of(taken["hada_t1"])
        fields = {"type": "hadamard", "rank": config.rank(path), "alpha": config.alpha(path, "alpha")}
        spec = AdapterSpec.from_dict({"residual": fields | {"kernel": kernel}})
        return LayerParts.from_tensors(path, spec, {"residual": taken}, kernel)
