"""Drawing with the sample, and pictures for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from trexport.models.diffusion import DenoisingStep
from trexport.models.sample import Sample

_SCALE = 4


def draw(sample: Sample, unet: DenoisingStep, prompts: Sequence[int], *, seed: int = 0) -> Tensor:
    """One picture for each prompt, from noise that depends on the seed alone.

    Args:
        unet: one step, float32.
        prompts: rows of the sample's prompts.

    Returns:
        (prompts, height, width), −1 to 1.
    """
    size = sample.image_size
    noise = torch.randn(len(prompts), 1, size, size, generator=torch.Generator().manual_seed(seed))
    images = sample.denoising.run(unet, noise, {"encoder_hidden_states": sample.prompts[list(prompts)]})
    return images[:, 0].clamp(-1, 1)


def png_strip(images: Tensor) -> bytes:
    """Pictures (n, height, width), −1 to 1, side by side as a PNG: black on white, enlarged."""
    from PIL import Image

    count, height, width = images.shape
    canvas = torch.ones(height, count * (width + 1) - 1)
    for index in range(count):
        left = index * (width + 1)
        canvas[:, left : left + width] = (1 - images[index]) / 2
    pixels = (canvas * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(pixels)
    image = image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def data_url(png: bytes) -> str:
    """A PNG as a URL that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
