"""Our own residual block: diffusers' `ResnetBlock2D`, its normalisations taking in the time embedding and the activation."""

from __future__ import annotations

from typing import final

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from trexport.models.fused import known
from trexport.models.fused.norm import GroupNormAct


@final
class FusedResnet(nn.Module):
    """A `ResnetBlock2D` without resampling, under the same parameter names; inference only.

    `temb` is (batch, time channels), or, when `time_columns` is set, (batch, anything) with this block's own shift in those
    columns.
    """

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1 = GroupNormAct(block.norm1, silu=True)
        self.conv1 = block.conv1
        self.time_emb_proj = block.time_emb_proj
        self.norm2 = GroupNormAct(block.norm2, silu=True)
        self.conv2 = block.conv2
        self.conv_shortcut = block.conv_shortcut
        if self.conv_shortcut is not None and self.conv_shortcut.bias is not None and self.conv2.bias is not None:
            both = self.conv2.bias.detach().float() if self.conv2.bias.dtype.itemsize < 4 else self.conv2.bias.detach()
            both = both + self.conv_shortcut.bias.detach().to(both.dtype)
            self.conv2.bias = nn.Parameter(both.to(self.conv2.bias.dtype), requires_grad=False)
            self.conv_shortcut.bias = None
        self.output_scale_factor = block.output_scale_factor
        self.time_columns: tuple[int, int] | None = None
        """First column and their number."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """(batch, in_channels, height, width) → (batch, out_channels, height, width)."""
        hidden = self.conv1(self.norm1(input_tensor))
        if self.time_columns is not None:
            shift = temb.narrow(1, *self.time_columns)
        else:
            assert self.time_emb_proj is not None
            shift = self.time_emb_proj(F.silu(temb))
        hidden = self.conv2(self.norm2(hidden, shift))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        hidden = input_tensor + hidden
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def own_resnets_(unet: nn.Module, left: dict[str, int]) -> dict[str, FusedResnet]:
    """Put our block in the place of every residual block that we know.

    Args:
        left: counts the others, by reason.

    Returns:
        all of ours, those that were there before too, by module path.
    """
    found: dict[str, FusedResnet] = {}
    for path, module in list(unet.named_modules()):
        if isinstance(module, FusedResnet):
            found[path] = module
        elif isinstance(module, ResnetBlock2D):
            reason = _reason_to_leave(module)
            if reason is not None:
                left[reason] = left.get(reason, 0) + 1
                continue
            found[path] = FusedResnet(module)
            unet.set_submodule(path, found[path])
    return found


def _reason_to_leave(block: ResnetBlock2D) -> str | None:
    if type(block) is not ResnetBlock2D:
        return type(block).__name__
    if block.training:
        return "training mode"
    if block.upsample is not None or block.downsample is not None:
        return "a residual block that resamples"
    if block.time_embedding_norm != "default" or block.time_emb_proj is None or block.skip_time_act:
        return f"time embedding {block.time_embedding_norm}"
    if not known.is_silu(block.nonlinearity):
        return type(block.nonlinearity).__name__
    return None
