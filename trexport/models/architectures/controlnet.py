"""The ControlNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trexport.io_spec import Axis, Dtype, ModelSpec, TensorSpec
from trexport.models.architectures.base import Architecture, Limit, axes_of
from trexport.models.architectures.unet import conditioned_arguments, conditioned_example, conditioned_inputs

_SD15: dict[str, Any] = {
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}

_TINY: dict[str, Any] = {
    "in_channels": 4,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [4, 6],
}


@final
class ControlNet(Architecture):
    """diffusers' `ControlNetModel`: what a UNet takes, and the picture `controlnet_cond` → what a UNet adds to what its
    blocks hand up, `down_block_res_samples.0`, …, and `mid_block_res_sample`. Optimum exports none: the names are
    diffusers'."""

    class_name: ClassVar[str] = "ControlNetModel"
    noun: ClassVar[str] = "ControlNet"
    folder: ClassVar[str] = "controlnet"
    random: ClassVar[Mapping[str, Mapping[str, Any]]] = {"controlnet-sd15": _SD15, "controlnet-tiny": _TINY}
    defaults: ClassVar[Mapping[str, Any]] = {
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "layers_per_block": 2,
    }

    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        inputs = conditioned_inputs(self.config, dtype, sizes, timestep_per_sample=timestep_per_sample)
        batch, height, width = axes_of(sizes, "batch_size", "height", "width")
        scale = 2 ** (len(self.config["conditioning_embedding_out_channels"]) - 1)
        picture = (batch, self.config["conditioning_channels"], _times(height, scale), _times(width, scale))
        inputs.append(TensorSpec("controlnet_cond", dtype, picture))
        found = [(channels, _over(height, down), _over(width, down)) for channels, down in self._handed_up()]
        names = [f"down_block_res_samples.{n}" for n in range(len(found) - 1)] + ["mid_block_res_sample"]
        outputs = tuple(TensorSpec(name, dtype, (batch, *axes)) for name, axes in zip(names, found, strict=True))
        return ModelSpec(tuple(inputs), outputs, dict(sizes or {}), self.class_name)

    def _handed_up(self) -> Iterator[tuple[int, int]]:
        """Channels, and how often smaller than the latents, of every output."""
        widths = self.config["block_out_channels"]
        yield widths[0], 1
        for level, channels in enumerate(widths):
            for _ in range(self.config["layers_per_block"]):
                yield channels, 2**level
            if level < len(widths) - 1:
                yield channels, 2 ** (level + 1)
        yield widths[-1], 2 ** (len(widths) - 1)

    def default_sizes(self) -> dict[str, int]:
        """Those of the UNet that it is for: a ControlNet's config does not say."""
        return {"batch_size": 2, "height": 64, "width": 64, "sequence_length": 77}

    def limits(self) -> Mapping[str, Limit]:
        side = Limit(multiple=2 ** (len(self.config["block_out_channels"]) - 1))
        return {"height": side, "width": side}

    @classmethod
    def arguments(cls, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return conditioned_arguments(feeds)

    @classmethod
    def outputs(cls, result: Any) -> tuple[Tensor, ...]:
        down, middle = result
        return (*down, middle)

    @classmethod
    def example(cls, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if name == "controlnet_cond":
            return torch.rand(shape, generator=generator)
        return conditioned_example(name, shape, generator)


def _times(axis: Axis, factor: int) -> Axis:
    return axis * factor if isinstance(axis, int) else f"{axis} * {factor}"


def _over(axis: Axis, factor: int) -> Axis:
    if factor == 1:
        return axis
    return axis // factor if isinstance(axis, int) else f"{axis} / {factor}"
