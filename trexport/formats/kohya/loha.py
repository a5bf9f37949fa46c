"""LoHa (arXiv 2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from trexport.formats.kohya.method import alpha_of, norm_of
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, LayerParts

_PAIRS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@final
class Loha:
    """`W' = W0 + (alpha / r)·(A1·B1) ⊙ (A2·B2)`, of convolutions also in Tucker form."""

    telling = "hada_w1_a"
    leaves = (*_PAIRS, *_CORES, "alpha", "dora_scale")

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        taken = {leaf: take(path, tensors, leaf, (2,)) for leaf in _PAIRS}
        kernel: tuple[int, ...] | None = None  # a file does not tell of a convolution whose kernel is flattened
        if any(leaf in tensors for leaf in _CORES):
            taken |= {leaf: take(path, tensors, leaf, (4,)) for leaf in _CORES}
            kernel = kernel_of(taken["hada_t1"])
        rank = taken["hada_w1_b"].shape[0]
        fields = {"type": "hadamard", "rank": rank, "alpha": alpha_of(path, tensors, rank), "kernel": kernel}
        spec: dict[str, Any] = {"residual": fields}
        parts = {"residual": taken}
        norm = norm_of(path, tensors)
        if norm is not None:
            spec["magnitude"], parts["magnitude"] = norm
        return LayerParts.from_tensors(path, AdapterSpec.from_dict(spec), parts, kernel)
