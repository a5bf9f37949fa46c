"""LoKr (arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, LayerParts


@final
class Lokr:
    """`W' = W0 + (alpha / r)·W1 ⊗ W2`, either matrix whole or of two factors, W2 of convolutions also in Tucker form."""

    leaves = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def check(self, config: PeftConfig) -> None:
        pass

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        taken: dict[str, Tensor] = {}
        kernel: tuple[int, ...] | None = None
        for whole in ("lokr_w1", "lokr_w2"):
            if whole in tensors:
                tensor = take(path, tensors, whole, (2, 4))
                kernel = kernel_of(tensor) if whole == "lokr_w2" and tensor.ndim == 4 else kernel
                taken[whole] = tensor.flatten(1)
            else:
                taken |= {leaf: take(path, tensors, leaf, (2,)) for leaf in (f"{whole}_a", f"{whole}_b")}
        if "lokr_t2" in tensors:
            taken["lokr_t2"] = take(path, tensors, "lokr_t2", (4,))
            kernel = kernel_of(taken["lokr_t2"])
        # what is left is one too many: a whole matrix beside its factors
        taken |= {leaf: tensor for leaf, tensor in tensors.items() if leaf not in taken}
        fields = {"type": "kronecker", "rank": config.rank(path), "alpha": config.alpha(path, "alpha")}
        spec = AdapterSpec.from_dict({"residual": fields})
        return LayerParts.from_tensors(path, spec, {"residual": taken}, kernel)
