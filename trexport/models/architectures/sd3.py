"""The transformer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from trexport.io_spec import Dtype, ModelSpec, TensorSpec
from trexport.models.architectures.base import FLOW_MATCHING, Architecture, Limit, Sampling, axes_of

# Stable Diffusion 3 medium
_SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

# Stable Diffusion 3.5 medium: a second attention on the image in its first blocks, keys and queries normalised
_SD35: dict[str, Any] = _SD3 | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}

_TINY: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}

_TINY_SD35: dict[str, Any] = _TINY | {"dual_attention_layers": [0], "qk_norm": "rms_norm"}


@final
class StableDiffusion3(Architecture):
    """diffusers' `SD3Transformer2DModel`: `hidden_states`, `encoder_hidden_states`, `pooled_projections`, `timestep` (one
    for each sample) → `out_hidden_states`."""

    class_name: ClassVar[str] = "SD3Transformer2DModel"
    noun: ClassVar[str] = "transformer of Stable Diffusion 3"
    folder: ClassVar[str] = "transformer"
    random: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd3": _SD3,
        "sd35": _SD35,
        "sd3-tiny": _TINY,
        "sd35-tiny": _TINY_SD35,
    }
    defaults: ClassVar[Mapping[str, Any]] = {"out_channels": 16, "patch_size": 2, "pos_embed_max_size": 96}
    sampling: ClassVar[Sampling | None] = FLOW_MATCHING

    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        config = self.config
        batch, height, width, tokens = axes_of(sizes, "batch_size", "height", "width", "sequence_length")
        inputs = (
            TensorSpec("hidden_states", dtype, (batch, config["in_channels"], height, width)),
            TensorSpec("encoder_hidden_states", dtype, (batch, tokens, config["joint_attention_dim"])),
            TensorSpec("pooled_projections", dtype, (batch, config["pooled_projection_dim"])),
            TensorSpec("timestep", "fp32", (batch,)),
        )
        channels = config["out_channels"] or config["in_channels"]
        outputs = (TensorSpec("out_hidden_states", dtype, (batch, channels, height, width)),)
        return ModelSpec(inputs, outputs, dict(sizes or {}), self.class_name)

    def default_sizes(self) -> dict[str, int]:
        """Two samples (classifier-free guidance) of the model's own size, CLIP's 77 tokens and T5's 256."""
        size = self.config["sample_size"]
        return {"batch_size": 2, "height": size, "width": size, "sequence_length": 333}

    def limits(self) -> Mapping[str, Limit]:
        patch = self.config["patch_size"]
        side = Limit(
            multiple=patch, most=patch * self.config["pos_embed_max_size"]
        )  # its table of positions ends there
        return {"height": side, "width": side}

    @classmethod
    def arguments(cls, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {**feeds, "return_dict": False}
