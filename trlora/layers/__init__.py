"""Layers with adapters: the only place that knows how a layer's weight is laid out."""

from torch import nn

from trlora.layers.adapter import LayerAdapter as LayerAdapter
from trlora.layers.base import AdaptedLayer as AdaptedLayer
from trlora.layers.change import adapted_bias as adapted_bias
from trlora.layers.change import adapted_weight as adapted_weight
from trlora.layers.change import weight_change as weight_change
from trlora.layers.conv import AdaptedConv2d as AdaptedConv2d
from trlora.layers.linear import AdaptedLinear as AdaptedLinear

ADAPTABLE = (nn.Linear, nn.Conv2d)
"""The kinds of layers that take adapters."""


def adapted(module: nn.Linear | nn.Conv2d) -> AdaptedLayer:
    """The layer around a module, without an adapter yet."""
    return AdaptedLinear(module) if isinstance(module, nn.Linear) else AdaptedConv2d(module)
