"""LoRA, LoCon, DoRA, and DyLoRA, whose files hold a LoRA of all its ranks; of a convolution its `lora_up` is a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from trexport.formats.kohya.method import alpha_of, norm_of
from trexport.formats.kohya.mid import with_mid
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, CheckpointError, LayerParts


@final
class Locon:
    """`W' = W0 + (alpha / r)·up·down`; with `lora_mid` (r, r, height, width) between them, the kernel is there."""

    telling = "lora_up.weight"
    leaves = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale")

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        down = take(path, tensors, "lora_down.weight", (2, 4))
        up = take(path, tensors, "lora_up.weight", (2, down.ndim))
        if kernel_of(up).count(1) != up.ndim - 2:
            raise CheckpointError(f"{path}: lora_up.weight has shape {tuple(up.shape)}, expected (out, r, 1, 1)")
        down, kernel = with_mid(path, tensors, "lora_up.weight", "lora_down.weight", "lora_mid.weight")
        rank = up.shape[1]
        spec: dict[str, Any] = {"residual": {"type": "low_rank", "rank": rank, "alpha": alpha_of(path, tensors, rank)}}
        parts = {"residual": {"lora_A.weight": down.flatten(1), "lora_B.weight": up.flatten(1)}}
        norm = norm_of(path, tensors)
        if norm is not None:
            spec["magnitude"], parts["magnitude"] = norm
        return LayerParts.from_tensors(path, AdapterSpec.from_dict(spec), parts, kernel)
