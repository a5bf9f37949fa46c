"""LoKr (arXiv 2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from trexport.formats.kohya.method import alpha_of, norm_of
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, LayerParts


@final
class Lokr:
    """`W' = W0 + (alpha / r)·W1 ⊗ W2`, either matrix whole or of two factors, W2 of convolutions also in Tucker form. Where
    both are whole there is no rank, and no scale."""

    telling = "lokr_"
    leaves = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "alpha",
        "dora_scale",
    )

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        taken: dict[str, Tensor] = {}
        kernel: tuple[int, ...] | None = None
        rank: int | None = None
        for whole in ("lokr_w1", "lokr_w2"):
            if whole in tensors:
                tensor = take(path, tensors, whole, (2, 4))
                kernel = kernel_of(tensor) if whole == "lokr_w2" and tensor.ndim == 4 else kernel
                taken[whole] = tensor.flatten(1)
            else:
                taken |= {leaf: take(path, tensors, leaf, (2,)) for leaf in (f"{whole}_a", f"{whole}_b")}
                rank = taken[f"{whole}_b"].shape[0]
        if "lokr_t2" in tensors:
            taken["lokr_t2"] = take(path, tensors, "lokr_t2", (4,))
            kernel = kernel_of(taken["lokr_t2"])
        # what is left is one too many: a whole matrix beside its factors
        taken |= {
            leaf: tensor
            for leaf, tensor in tensors.items()
            if leaf not in taken and leaf not in ("alpha", "dora_scale")
        }
        alpha = None if rank is None else alpha_of(path, tensors, rank)
        spec: dict[str, Any] = {"residual": {"type": "kronecker", "rank": rank, "alpha": alpha}}
        parts = {"residual": taken}
        norm = norm_of(path, tensors)
        if norm is not None:
            spec["magnitude"], parts["magnitude"] = norm
        return LayerParts.from_tensors(path, AdapterSpec.from_dict(spec), parts, kernel)
