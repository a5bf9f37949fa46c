"""Linear layers with adapters: `y = (W0 + Σ s_k (W'_k − W0))·x + b` with `W'_k = diag(gain_k)·(U_kᵀ·W0·T_k + Δ_k)`."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn import functional

from trlora.layers.adapter import LayerAdapter
from trlora.layers.base import AdaptedLayer


@final
class AdaptedLinear(AdaptedLayer):
    """An `nn.Linear` with adapters, kept factored: see `AdaptedLayer`."""

    base: nn.Linear

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight, self.bias)

    def _factored(self, x: Tensor) -> Tensor:
        moved, added = x, None
        for adapter, strength in self.active():
            inside = x if adapter.dtype is None else x.to(adapter.dtype)
            step: Tensor | None = None
            if adapter.outside:
                step = self._outside(adapter, inside)
            else:
                if not adapter.transform.trivial:
                    # as a change of x: at the start T·x equals x, and the sum keeps x's bits
                    moved = moved + ((adapter.transform(inside) - inside) * strength).to(x.dtype)
                if not adapter.residual.trivial:
                    step = adapter.residual(inside)
            if step is not None:
                added = step * strength if added is None else added + step * strength
        y = self.base(moved)
        return y if added is None else y + added.to(y.dtype)

    def _outside(self, adapter: LayerAdapter, x: Tensor) -> Tensor:
        """`(W' − W0)·x` and what the bias gains: a product with W0 of its own, for U and the gain stand outside of it."""
        weight = self.weight.to(x.dtype)
        plain = functional.linear(x, weight)
        whole = plain if adapter.transform.trivial else functional.linear(adapter.transform(x), weight)
        if not adapter.output_transform.trivial:
            whole = adapter.output_transform.multiply(whole.reshape(-1, whole.shape[-1])).reshape(whole.shape)
        if not adapter.residual.trivial:
            whole = whole + adapter.residual(x)
        if adapter.magnitude.trivial:
            return whole - plain
        gain = adapter.gain(weight)
        step = gain * whole - plain
        if adapter.magnitude.scales_bias and self.bias is not None:
            step = step + (gain - 1) * self.bias.to(x.dtype)
        return step
