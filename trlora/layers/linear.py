"""Linear layers with adapters: `y = (W0·(I + Σ s_k (T_k − I)) + Σ s_k Δ_k)·x + b`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from trlora.errors import ShapeError, TargetError
from trlora.layers.adapter import LayerAdapter


def weight_change(
    weight: Tensor, adapters: Iterable[tuple[LayerAdapter, float]], compute_dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """What adapters add to a weight: `W0·Σ s_k (T_k − I) + Σ s_k Δ_k`.

    Args:
        weight: W0, (out, in).
        adapters: pairs of adapter and strength. The sum makes their order irrelevant.

    Returns:
        (out, in) in `compute_dtype` on the weight's device; None when no adapter changes anything (every strength zero).
    """
    base = weight.to(compute_dtype)
    change: Tensor | None = None
    for adapter, strength in adapters:
        if strength == 0:
            continue
        if adapter.dtype is not None and torch.promote_types(adapter.dtype, compute_dtype) != adapter.dtype:
            adapter = copy.deepcopy(adapter).to(compute_dtype)  # so that T and Δ are computed in it as well
        steps: list[Tensor] = []
        if not adapter.transform.trivial:
            parameter = next(adapter.transform.parameters())
            turned = adapter.transform.multiply(base.to(parameter.device, parameter.dtype)).to(base)
            steps.append(turned.sub_(base))  # in place: fresh memory costs more than the arithmetic
        if not adapter.residual.trivial:
            steps.append(adapter.residual.delta().to(base))
        for step in steps:
            if strength != 1:
                step = step * strength
            change = step if change is None else change.add_(step)
    return change


def adapted_weight(
    weight: Tensor, adapters: Iterable[tuple[LayerAdapter, float]], compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense weight `W0·(I + Σ s_k (T_k − I)) + Σ s_k Δ_k`, computed in `compute_dtype`, cast once to W0's dtype.

    Being W0 plus a change, it keeps W0's bits where the adapters change nothing: at strength zero, and at their start.

    Args:
        weight: W0, (out, in).
        adapters: pairs of adapter and strength.

    Returns:
        (out, in), dtype and device of `weight`; `weight` itself when every strength is zero.
    """
    change = weight_change(weight, adapters, compute_dtype)
    return weight if change is None else (weight.to(compute_dtype) + change).to(weight.dtype)


@final
class AdaptedLinear(nn.Module):
    """An `nn.Linear`, left as it is, with any number of named adapters, each with a strength.

    The forward pass keeps the adapters factored. It computes each in the dtype of its own parameters (keep cores in
    float32 beside a half-precision base) and returns the base layer's dtype.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.strengths: dict[str, float] = {}

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The base weight, untouched: what code that asks a linear layer for its dtype or device reads."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def add(self, name: str, adapter: LayerAdapter, strength: float = 1.0) -> None:
        """Add an adapter.

        Raises:
            ShapeError: it does not fit the layer.
            TargetError: the name is taken, empty, or one that `nn.ModuleDict` does not allow (a dot, `keys`).
            ValueError: the strength is NaN or Inf.
        """
        if (adapter.in_features, adapter.out_features) != (self.in_features, self.out_features):
            raise ShapeError(
                f"adapter {name!r} is for {adapter.in_features} → {adapter.out_features} features, "
                f"the layer has {self.in_features} → {self.out_features}"
            )
        if not name or "." in name or hasattr(self.adapters, name):  # an adapter there is an attribute as well
            raise TargetError(f"adapter name {name!r} cannot be used: expected a new name without dots")
        self.strengths[name] = _finite(name, strength)
        self.adapters[name] = adapter.to(self.weight.device)

    def set_strength(self, name: str, strength: float) -> None:
        """Set the strength of one adapter. Raises `TargetError` for an unknown name, `ValueError` for NaN or Inf."""
        if name not in self.adapters:
            raise TargetError(f"no adapter {name!r} here, found {sorted(self.adapters)}")
        self.strengths[name] = _finite(name, strength)

    def active(self) -> list[tuple[LayerAdapter, float]]:
        """The adapters whose strength is not zero, with it."""
        return [(self._adapter(name), self.strengths[name]) for name in self.adapters if self.strengths[name] != 0]

    def merged_weight(self, compute_dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight with every adapter at its strength; see `adapted_weight`."""
        return adapted_weight(self.weight, self.active(), compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        moved, added = x, None
        for adapter, strength in self.active():
            inside = x if adapter.dtype is None else x.to(adapter.dtype)
            if not adapter.transform.trivial:
                # as a change of x: at the start T·x equals x, and the sum keeps x's bits
                moved = moved + ((adapter.transform(inside) - inside) * strength).to(x.dtype)
            if not adapter.residual.trivial:
                step = adapter.residual(inside) * strength
                added = step if added is None else added + step
        y = self.base(moved)
        return y if added is None else y + added.to(y.dtype)

    def _adapter(self, name: str) -> LayerAdapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, LayerAdapter)
        return adapter


def _finite(name: str, strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"strength {strength} of adapter {name!r}, expected a finite number")
    return float(strength)
