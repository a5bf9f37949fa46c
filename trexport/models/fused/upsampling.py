"""Upsampling by two and the 3×3 convolution behind it as one transposed convolution of the small map.

Each pixel of the small map stands four times in the great one, so that the nine taps of an output see four pixels only. The
weights of those that see the same one are added beforehand: for each of the four places that an output can have in its block
of 2×2 there is a kernel of 2×2, four products in the place of nine. Interleaved, the four are the kernel, 4×4, of a
transposed convolution of stride 2, and the great map is written once.
"""

from __future__ import annotations

from typing import final

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from trexport.models.fused.options import FuseOptions, Outcome

_REPLACEABLE = "convolutions whose weights can be replaced"
_OTHER = "upsampling that is no nearest neighbour and one plain 3×3 convolution"


_TAPS = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
"""Of each tap of the transposed convolution along an axis: the taps of the convolution that are in it."""


@final
class FoldedUpsample(nn.Module):
    """An `Upsample2D`; inference only. `conv.weight` is (in_channels, out_channels, 4, 4)."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        channels = convolution.in_channels, convolution.out_channels
        self.conv = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, bias=False, device="meta")
        self.conv.weight = nn.Parameter(folded(convolution.weight.detach()), requires_grad=False)
        self.conv.bias = convolution.bias

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """(batch, in_channels, height, width) → (batch, out_channels, 2·height, 2·width).

        Raises:
            ValueError: an output of another size, which maps have whose sizes no power of two divides.
        """
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            raise ValueError(f"a map of {height}×{width} to be made {tuple(output_size)}, expected twice as great")
        return self.conv(hidden_states)


def folded(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) → (in, out, 4, 4), the taps that see the same pixel added, in float32 at least; channels last where
    the weight is, else every step would turn it."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    taps = _TAPS.to(wide)
    last = weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.einsum("uh,vw,oihw->iouv", taps, taps, wide).to(weight.dtype).contiguous(memory_format=layout)


def fuse_upsampling_(unet: UNet2DConditionModel, options: FuseOptions) -> Outcome:
    """The upsampling between the blocks. Convolutions of `options.replaceable` stay: who replaces a weight knows it as it is
    in the model."""
    left: dict[str, int] = {}
    count = 0
    for path, module in list(unet.named_modules()):
        if not isinstance(module, Upsample2D):
            continue
        convolution = getattr(module, "conv", None)
        if not isinstance(convolution, nn.Conv2d) or not _is_known(module, convolution):
            reason = _OTHER
        elif f"{path}.conv" in options.replaceable:
            reason = _REPLACEABLE
        else:
            unet.set_submodule(path, FoldedUpsample(convolution))
            count += 1
            continue
        left[reason] = left.get(reason, 0) + 1
    return Outcome(count, left)


def _is_known(module: Upsample2D, convolution: nn.Conv2d) -> bool:
    return (
        type(module) is Upsample2D
        and module.interpolate
        and module.norm is None
        and type(convolution) is nn.Conv2d
        and convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.dilation == (1, 1)
        and convolution.padding == (1, 1)
        and convolution.padding_mode == "zeros"
        and convolution.groups == 1
    )
