"""What is asked of one layer: the weight before, the weight wanted, and how far an adapter is from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self, final

import torch
from torch import Tensor

from trlora.errors import FitError, ShapeError
from trlora.layers import LayerAdapter
from trlora.layers.change import widened


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """Find an adapter with `‖W* − W'‖_F` small. Both weights are matrices, (out, in), float64."""

    base: Tensor
    """W0."""
    tuned: Tensor
    """W*."""

    @classmethod
    def of(cls, base: Tensor, tuned: Tensor) -> Self:
        """From two weights of a layer in any floating dtype, (out, in) or (out, in/groups, height, width).

        Raises:
            ShapeError: their shapes differ, or they have fewer than two dimensions.
            FitError: one holds NaN or Inf, or integers.
        """
        if base.shape != tuned.shape or base.dim() < 2:
            raise ShapeError(
                f"weights of shape {tuple(base.shape)} and {tuple(tuned.shape)}, expected two of one shape"
            )
        for name, weight in (("base", base), ("fine-tuned", tuned)):
            if not weight.dtype.is_floating_point:
                raise FitError(f"the {name} weight has dtype {weight.dtype}, expected a floating-point one")
            if not torch.isfinite(weight).all():
                count = int((~torch.isfinite(weight)).sum())
                raise FitError(f"{count} of {weight.numel()} values of the {name} weight are NaN or Inf")
        return cls(base.detach().double().flatten(1), tuned.detach().double().flatten(1))

    @cached_property
    def change(self) -> float:
        """`‖W* − W0‖_F`: the error of doing nothing."""
        return float(torch.linalg.vector_norm(self.tuned - self.base))

    @cached_property
    def gram(self) -> Tensor:
        """`W0ᵀ·W0`, (in, in)."""
        return self.base.T @ self.base

    @cached_property
    def cross(self) -> Tensor:
        """`W0ᵀ·W*`, (in, in)."""
        return self.base.T @ self.tuned

    def error(self, adapter: LayerAdapter) -> float:
        """`‖W* − W'‖_F`, in float64 whatever the dtype of the adapter's parameters."""
        with torch.no_grad():
            return float(torch.linalg.vector_norm(self.rest(widened(adapter, torch.float64))))

    def rest(self, adapter: LayerAdapter) -> Tensor:
        """`W* − W'`, (out, in), differentiable in the adapter's parameters."""
        change = adapter.change(self.base)
        return self.tuned - self.base if change is None else self.tuned - self.base - change
