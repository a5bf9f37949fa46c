"""The UNet of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trexport.io_spec import Dtype, ModelSpec, TensorSpec
from trexport.models.architectures.base import Architecture, Limit, Sampling, axes_of

_SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}

# of 768 pixels; whether it predicts noise or velocity is the scheduler's business
_SD21: dict[str, Any] = _SD15 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}

_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}

_TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}

_TINY_SD21: dict[str, Any] = _TINY | {
    "attention_head_dim": [4, 8],
    "cross_attention_dim": 40,
    "use_linear_projection": True,
}

_TINY_SDXL: dict[str, Any] = _TINY | {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
}

STABLE_DIFFUSION = Sampling(
    "sample",
    "DDIMScheduler",
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    },
)


@final
class UNet(Architecture):
    """diffusers' `UNet2DConditionModel`: `sample`, `timestep`, `encoder_hidden_states`, of Stable Diffusion XL also
    `text_embeds` and `time_ids` → `out_sample`."""

    class_name: ClassVar[str] = "UNet2DConditionModel"
    noun: ClassVar[str] = "UNet"
    rewritable: ClassVar[bool] = True
    folder: ClassVar[str] = "unet"
    random: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd15": _SD15,
        "sd21": _SD21,
        "sdxl": _SDXL,
        "tiny": _TINY,
        "sd21-tiny": _TINY_SD21,
        "tiny-sdxl": _TINY_SDXL,
    }
    sampling: ClassVar[Sampling | None] = STABLE_DIFFUSION

    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        inputs = conditioned_inputs(self.config, dtype, sizes, timestep_per_sample=timestep_per_sample)
        batch, height, width = axes_of(sizes, "batch_size", "height", "width")
        outputs = (TensorSpec("out_sample", dtype, (batch, self.config["out_channels"], height, width)),)
        return ModelSpec(tuple(inputs), outputs, dict(sizes or {}), self.class_name)

    def default_sizes(self) -> dict[str, int]:
        """Two samples (classifier-free guidance) of the UNet's own size, CLIP's 77 tokens."""
        size = self.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return {"batch_size": 2, "height": height, "width": width, "sequence_length": 77}

    def limits(self) -> Mapping[str, Limit]:
        side = Limit(multiple=2 ** (len(self.config["block_out_channels"]) - 1))  # two for every level but the last
        # diffusers' upsampling asks for contiguous memory from 64 samples on, which no ONNX graph knows of; without the
        # bound torch.export fails, refines the range and starts over, for twice the time
        return {"batch_size": Limit(most_traced=63), "height": side, "width": side}

    @classmethod
    def arguments(cls, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return conditioned_arguments(feeds)

    @classmethod
    def example(cls, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return conditioned_example(name, shape, generator)


def conditioned_inputs(
    config: Mapping[str, Any], dtype: Dtype, sizes: Mapping[str, int] | None, *, timestep_per_sample: bool
) -> list[TensorSpec]:
    """What UNets and ControlNets take."""
    batch, height, width, tokens = axes_of(sizes, "batch_size", "height", "width", "sequence_length")
    context = config["cross_attention_dim"]
    inputs = [
        TensorSpec("sample", dtype, (batch, config["in_channels"], height, width)),
        TensorSpec("timestep", "fp32", (batch,) if timestep_per_sample else ()),
        TensorSpec(
            "encoder_hidden_states", dtype, (batch, tokens, context if isinstance(context, int) else context[0])
        ),
    ]
    if config.get("addition_embed_type") == "text_time":
        time_width = 6 * config["addition_time_embed_dim"]
        text_width = config["projection_class_embeddings_input_dim"] - time_width
        inputs += [TensorSpec("text_embeds", dtype, (batch, text_width)), TensorSpec("time_ids", dtype, (batch, 6))]
    return inputs


def conditioned_arguments(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that UNets and ControlNets share."""
    added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds}
    others = {name: value for name, value in feeds.items() if name not in added}
    return others | ({"added_cond_kwargs": added} if added else {}) | {"return_dict": False}


def conditioned_example(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Something to feed an input of a UNet or ControlNet with."""
    if name == "time_ids":  # original size, crop, target size in pixels
        return torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).expand(shape).contiguous()
    return torch.randn(shape, generator=generator)
