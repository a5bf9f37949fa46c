"""Penalties on the transforms of a model, as terms of a loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trlora.errors import TargetError
from trlora.inject import adapted_modules
from trlora.layers import LayerAdapter

Penalty = Literal["identity", "orthogonal"]


def penalty(model: nn.Module, kind: Penalty = "identity", name: str = "default") -> Tensor:
    """The sum of a penalty over the transforms of one adapter, a scalar to be weighted and added to a loss.

    Args:
        kind: "identity" holds the weights near the pre-trained ones; "orthogonal" leaves them free to turn.
        name: the adapter's name.

    Raises:
        ValueError: another kind.
        TargetError: the model has no adapter of that name.
    """
    if kind not in ("identity", "orthogonal"):
        raise ValueError(f"penalty {kind!r}, expected 'identity' or 'orthogonal'")
    total: Tensor | None = None
    layers = [layer for layer in adapted_modules(model).values() if name in layer.adapters]
    if not layers:
        raise TargetError(f"{type(model).__name__} has no adapter {name!r}; use inject_ first")
    for layer in layers:
        adapter = layer.adapters[name]
        assert isinstance(adapter, LayerAdapter)
        for transform in (adapter.transform, adapter.output_transform):
            if not transform.trivial:
                term = transform.identity_penalty() if kind == "identity" else transform.orthogonal_penalty()
                total = term if total is None else total + term
    return torch.zeros(()) if total is None else total
