"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, CheckpointError, LayerParts, SpecError

_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Variants with arithmetic of their own."""

_MOVES_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Starts that take something out of the base's weights, which the adapter then puts back."""


@final
class Lora:
    """`W' = W0 + (alpha / r)·B·A`, with rsLoRA `alpha / √r`; with DoRA every row of W' brought to a trained norm."""

    leaves = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight")

    def check(self, config: PeftConfig) -> None:
        for name in _UNSUPPORTED:
            if config.fields.get(name):
                raise SpecError(f"{name} is {config.fields[name]!r}: this variant of LoRA is not read")
        if config.flag("lora_bias", False):
            raise SpecError("lora_bias is true: biases of B are not read, only weights change")
        start = str(config.fields.get("init_lora_weights", True)).lower()
        if start.startswith(_MOVES_THE_BASE):
            raise SpecError(
                f"init_lora_weights is {start!r}: the adapter belongs to a base whose weights PEFT has changed, not to the "
                "original one; convert it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
            )

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        a = take(path, tensors, "lora_A.weight", (2, 4))
        b = take(path, tensors, "lora_B.weight", (a.ndim,))
        if kernel_of(b).count(1) != b.ndim - 2:
            raise CheckpointError(f"{path}: lora_B.weight has shape {tuple(b.shape)}, expected (out, r, 1, 1)")
        rank, alpha = config.rank(path), config.alpha(path, "lora_alpha")
        if config.flag("use_rslora", False):
            alpha *= math.sqrt(rank)
        fields: dict[str, dict[str, object]] = {"residual": {"type": "low_rank", "rank": rank, "alpha": alpha}}
        parts = {"residual": {"lora_A.weight": a.flatten(1), "lora_B.weight": b.flatten(1)}}
        norms = [leaf for leaf in self.leaves[2:] if leaf in tensors]
        if config.flag("use_dora", False) != bool(norms):
            raise CheckpointError(
                f"{path}: use_dora is {config.fields.get('use_dora', False)}, lora_magnitude_vector is "
                f"{'there' if norms else 'missing'}"
            )
        if norms:
            fields["magnitude"] = {"type": "norm"}
            parts["magnitude"] = {"norm": tensors[norms[0]].flatten()}
        return LayerParts.from_tensors(path, AdapterSpec.from_dict(fields), parts, kernel_of(a))
