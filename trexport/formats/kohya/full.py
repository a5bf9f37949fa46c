"""Whole differences of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from trexport.formats.peft.method import kernel_of, take
from trlora import AdapterSpec, CheckpointError, LayerParts


@final
class Full:
    """`W' = W0 + diff`: a Kronecker product with the number one."""

    telling = "diff"
    leaves = ("diff", "diff_b")

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        diff = take(path, tensors, "diff", (2, 4))
        if "diff_b" in tensors and bool(tensors["diff_b"].any()):
            raise CheckpointError(f"{path}: diff_b: a change of the bias is not read, only weights change")
        spec = AdapterSpec.from_dict({"residual": {"type": "kronecker", "rank": None, "alpha": None}})
        tensors = {"lokr_w1": torch.ones(1, 1, dtype=diff.dtype), "lokr_w2": diff.flatten(1)}
        return LayerParts.from_tensors(path, spec, {"residual": tensors}, kernel_of(diff))
