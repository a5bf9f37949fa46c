"""Convolutions with adapters."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from trlora.layers.base import AdaptedLayer


@final
class AdaptedConv2d(AdaptedLayer):
    """An `nn.Conv2d` of any kernel, stride, padding (zero or other), dilation and groups, with adapters on its weight.

    Beside the base convolution runs a second one with what an adapter adds to the weight, which it takes as a matrix,
    (out, in/groups·height·width): T mixes the taps of overlapping patches, so it has no exact form on the activations.
    """

    base: nn.Conv2d

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__(base)
        # what code that asks a convolution for its geometry reads
        self.in_channels, self.out_channels, self.groups = base.in_channels, base.out_channels, base.groups
        self.kernel_size, self.stride, self.padding = base.kernel_size, base.stride, base.padding
        self.dilation, self.padding_mode = base.dilation, base.padding_mode

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.base._conv_forward(x, weight, self.bias)

    def _factored(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for adapter, strength in self.active():
            dtype = x.dtype if adapter.dtype is None else adapter.dtype
            change = adapter.change(self.weight.to(dtype).flatten(1))
            if change is None:
                continue
            bias = None
            if adapter.magnitude.scales_bias and self.bias is not None:
                bias = (adapter.gain(self.weight.to(dtype).flatten(1)) - 1) * self.bias.to(dtype)
            # it knows the padding modes, and takes another weight
            step = self.base._conv_forward(x.to(dtype), change.reshape(self.weight.shape), bias)
            y = y + (step * strength).to(y.dtype)
        return y
