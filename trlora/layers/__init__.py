"""Layers with adapters: the only place that knows how a layer's weight is laid out."""

from trlora.layers.adapter import LayerAdapter as LayerAdapter
from trlora.layers.linear import AdaptedLinear as AdaptedLinear
from trlora.layers.linear import adapted_weight as adapted_weight
from trlora.layers.linear import weight_change as weight_change
