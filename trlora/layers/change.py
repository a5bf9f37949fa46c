"""What adapters make of a layer's weight and bias: `W' = W0 + Σ s_k (W'_k − W0)`, W'_k the weight with one adapter alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from trlora.layers.adapter import LayerAdapter


def weight_change(
    weight: Tensor, adapters: Iterable[tuple[LayerAdapter, float]], compute_dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """What adapters add to a weight: `Σ s_k (diag(gain_k)·(U_kᵀ·W0·T_k + Δ_k) − W0)`, without magnitudes
    and output transforms `W0·Σ s_k (T_k − I) + Σ s_k Δ_k`.

    Args:
        weight: W0, (out, in), or of a convolution (out, in/groups, height, width).
        adapters: pairs of adapter and strength. The sum makes their order irrelevant.

    Returns:
        The weight's shape in `compute_dtype` on its device; None when no adapter changes anything (every strength zero).
    """
    base = weight.to(compute_dtype).flatten(1)
    change: Tensor | None = None
    for adapter, strength in adapters:
        if strength == 0:
            continue
        step = widened(adapter, compute_dtype).change(base)
        if step is None:
            continue
        if strength != 1:  # a step is nobody else's: fresh memory costs more than the arithmetic
            step = step * strength if step.requires_grad else step.mul_(strength)
        change = step if change is None else change.add_(step)
    return None if change is None else change.reshape(weight.shape)


def adapted_weight(
    weight: Tensor, adapters: Iterable[tuple[LayerAdapter, float]], compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense weight `W0 + Σ s_k (W'_k − W0)`, computed in `compute_dtype`, cast once to W0's dtype.

    Being W0 plus a change, it keeps W0's bits where the adapters change nothing: at strength zero, and at their start.

    Args:
        weight: W0, (out, in), or of a convolution (out, in/groups, height, width).
        adapters: pairs of adapter and strength.

    Returns:
        Shape, dtype and device of `weight`; `weight` itself when every strength is zero.
    """
    change = weight_change(weight, adapters, compute_dtype)
    return weight if change is None else (weight.to(compute_dtype) + change).to(weight.dtype)


def adapted_bias(
    bias: Tensor, adapters: Iterable[tuple[LayerAdapter, float]], compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The bias `b + Σ s_k (gain_k − 1)·b` over the adapters whose magnitude scales it, computed and cast as the weight is.

    Args:
        bias: b, (out,).

    Returns:
        `bias` itself where no adapter scales it.
    """
    base, result = bias.to(compute_dtype), None
    for adapter, strength in adapters:
        if strength != 0 and adapter.magnitude.scales_bias:
            gain = widened(adapter, compute_dtype).gain(base).to(base)
            step = (gain - 1) * base * strength
            result = base + step if result is None else result + step
    return bias if result is None else result.to(bias.dtype)


def widened(adapter: LayerAdapter, compute_dtype: torch.dtype) -> LayerAdapter:
    """The adapter, or where its parameters are narrower than `compute_dtype` a copy of it in that."""
    if adapter.dtype is None or torch.promote_types(adapter.dtype, compute_dtype) == adapter.dtype:
        return adapter
    return copy.deepcopy(adapter).to(compute_dtype)
