"""Names that the layout of a repository, what runs in the server, and its clients agree on."""

from __future__ import annotations

ADAPTER, STRENGTH = "adapter", "adapter_strength"
"""Inputs (batch, n): for each sample the names of its adapters, empty for none, and their strengths, NaN for their own."""
ADAPTERS = "adapters"
"""The folder of adapters, in a model's folder."""
ARTIFACT = "artifact"
"""The folder of the artifact, in a version's."""
PROMPT, NEGATIVE, LATENTS = "prompt_embeds", "negative_prompt_embeds", "latents"
"""What the model that denoises takes in the UNet's dtype, (batch, tokens, width), and float32 noise for it to start from."""


def image_name(unet: str) -> str:
    """The name of the model that denoises beside a UNet's."""
    return f"{unet}_image"
