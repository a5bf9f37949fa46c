"""Several linear layers of one input as one layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trexport.models.rows import Rows


def stacked(layers: Mapping[str, nn.Linear], name: str) -> tuple[nn.Linear, dict[str, Rows]]:
    """One layer whose output is the layers' outputs side by side, in their order.

    Args:
        layers: by module path, all with or all without a bias, all of one width, dtype and device.
        name: the new layer's own module path.

    Returns:
        the layer, and for each path where its weight's rows are.
    """
    weight = torch.cat([layer.weight.detach() for layer in layers.values()])
    biases = [layer.bias.detach() for layer in layers.values() if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    if bias is not None and bias.numel() != weight.shape[0]:
        raise ValueError(f"{name}: {len(biases)} of {len(layers)} layers have a bias, expected all or none")
    placements: dict[str, Rows] = {}
    first = 0
    for path, layer in layers.items():
        placements[path] = Rows(f"{name}.weight", first, layer.out_features)
        first += layer.out_features
    return linear_of(weight, bias), placements


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these very tensors, frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
