"""The transformer of Flux.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trexport.errors import UsageError
from trexport.io_spec import Dtype, ModelSpec, TensorSpec
from trexport.models.architectures.base import FLOW_MATCHING, Architecture, Sampling, axes_of

# Flux.1-dev; schnell is the same without guidance
_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}

_TINY: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 12,
    "out_channels": None,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": [2, 2, 4],
}

_PACKED = 2
"""Latents a side that are one token."""


@final
class Flux(Architecture):
    """diffusers' `FluxTransformer2DModel`: `hidden_states`, `encoder_hidden_states`, `pooled_projections`, `timestep` (0 to
    1, one for each sample), `img_ids`, `txt_ids`, where it is distilled `guidance` → `out_hidden_states`.

    Latents come packed, two by two in one token: (batch, packed_height_width, channels). Ids are rows and columns of tokens,
    float32 in every precision, the same for all samples.
    """

    class_name: ClassVar[str] = "FluxTransformer2DModel"
    noun: ClassVar[str] = "transformer of Flux"
    folder: ClassVar[str] = "transformer"
    random: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "flux": _FLUX,
        "flux-tiny": _TINY,
        "flux-schnell-tiny": _TINY | {"guidance_embeds": False},
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "patch_size": 1,
        "out_channels": None,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    }
    sampling: ClassVar[Sampling | None] = FLOW_MATCHING
    shared: ClassVar[frozenset[str]] = frozenset({"img_ids", "txt_ids"})
    timestep_scale: ClassVar[float] = 1e-3

    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        config = self.config
        batch, image, tokens = axes_of(sizes, "batch_size", "packed_height_width", "sequence_length")
        axes = len(config["axes_dims_rope"])
        inputs = [
            TensorSpec("hidden_states", dtype, (batch, image, config["in_channels"])),
            TensorSpec("encoder_hidden_states", dtype, (batch, tokens, config["joint_attention_dim"])),
            TensorSpec("pooled_projections", dtype, (batch, config["pooled_projection_dim"])),
            TensorSpec("timestep", "fp32", (batch,)),
            TensorSpec("img_ids", "fp32", (image, axes)),
            TensorSpec("txt_ids", "fp32", (tokens, axes)),
        ]
        if config["guidance_embeds"]:
            inputs.append(TensorSpec("guidance", "fp32", (batch,)))
        channels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
        outputs = (TensorSpec("out_hidden_states", dtype, (batch, image, channels)),)
        return ModelSpec(tuple(inputs), outputs, dict(sizes or {}), self.class_name)

    def default_sizes(self) -> dict[str, int]:
        """One sample (guidance is an input) of 1024 pixels a side, 512 tokens of T5."""
        return {"batch_size": 1, "packed_height_width": 4096, "sequence_length": 512}

    def sizes(self, given: Mapping[str, int | None]) -> dict[str, int]:
        """Height and width of the latents, too, which must go together."""
        sides = {axis: given[axis] for axis in ("height", "width") if given.get(axis) is not None}
        others = {axis: size for axis, size in given.items() if axis not in ("height", "width")}
        if not sides:
            return super().sizes(others)
        height, width = sides.get("height"), sides.get("width")
        if height is None or width is None or height % _PACKED or width % _PACKED:
            raise UsageError(
                f"{sides} given, a {self.class_name} packs height and width into one axis: give both, multiples of "
                f"{_PACKED}"
            )
        return super().sizes({**others, "packed_height_width": height * width // _PACKED**2})

    @classmethod
    def arguments(cls, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {**feeds, "return_dict": False}

    @classmethod
    def example(cls, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if name == "img_ids":  # 0, row, column, of a picture that is not square
            columns = next(size for size in range(math.isqrt(shape[0]), 0, -1) if shape[0] % size == 0)
            index = torch.arange(shape[0])
            ids = torch.zeros(shape)
            ids[:, 1], ids[:, 2] = index // columns, index % columns
            return ids
        if name == "txt_ids":
            return torch.zeros(shape)
        if name == "guidance":
            return torch.full(shape, 3.5)
        return torch.randn(shape, generator=generator)
