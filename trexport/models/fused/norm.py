"""Group normalisation with what stands around it: a shift for each sample and channel before, SiLU after."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from trexport.models.fused.options import Kernels


@final
class GroupNormAct(nn.Module):
    """`silu(group_norm(x + shift))`, with the parameters of a `GroupNorm` under their names."""

    def __init__(self, norm: nn.GroupNorm, *, silu: bool, kernels: Kernels = "torch") -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.num_groups = norm.num_groups
        self.eps = norm.eps
        self.silu = silu
        self.kernels: Kernels = kernels

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (batch, channels, height, width).
            shift: (batch, channels), added to every pixel first.

        Returns:
            as `x`; from Triton's kernels channels-last.
        """
        if self.kernels == "triton":
            from trexport.models.fused.ops import group_norm  # torch warns there where Triton is missing

            return group_norm(x, shift, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        if shift is not None:
            x = x + shift[:, :, None, None]
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.silu(x) if self.silu else x
