"""Whole differences of weights; those of biases are offsets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, LayerParts


@final
class Full:
    """`W' = W0 + diff`: a Kronecker product with the number one."""

    telling = "diff"
    leaves = ("diff",)

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        diff = take(path, tensors, "diff", (2, 4))
        spec = AdapterSpec.from_dict({"residual": {"type": "kronecker", "rank": None, "alpha": None}})
        tensors = {"lokr_w1": torch.ones(1, 1, dtype=diff.dtype), "lokr_w2": diff.flatten(1)}
        return LayerParts.from_tensors(path, spec, {"residual": tensors}, kernel_of(diff))
