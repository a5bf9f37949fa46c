"""Pictures of a model as it stands: DDIM with guidance, from embeddings that are cached."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from components import Components
from diffusers import DDIMScheduler
from images import pictures
from PIL import Image
from torch import Tensor

Predictor = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""(noisy latents (batch, …), timestep, conditions with a leading batch axis) → the model's prediction."""


def unet_predictor(unet: Any) -> Predictor:
    """A UNet asked as `draw` and the losses ask: `states`, and `pooled` and `time_ids` where there are."""

    def predict(latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return unet(latents, timestep, conditions["states"], **added(conditions), return_dict=False)[0]

    return predict


def added(conditions: dict[str, Tensor]) -> dict[str, Any]:
    """What Stable Diffusion XL's models are told beside the text's states."""
    if "pooled" not in conditions:
        return {}
    return {"added_cond_kwargs": {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}}


def with_sizes(embedding: dict[str, Tensor], resolution: int) -> dict[str, Tensor]:
    """A prompt's embedding with the sizes that Stable Diffusion XL is told of a whole square."""
    if "pooled" not in embedding:
        return embedding
    return embedding | {"time_ids": torch.tensor([resolution, resolution, 0, 0, resolution, resolution]).float()}


@torch.no_grad()
def draw(
    predict: Predictor,
    components: Components,
    conditions: dict[str, Tensor],
    without: dict[str, Tensor],
    *,
    resolution: int,
    seeds: list[int],
    steps: int = 25,
    guidance: float = 7.5,
    device: Any = "cpu",
) -> list[Image.Image]:
    """A picture for each seed, whatever else is drawn beside it.

    Args:
        conditions, without: of one prompt and of the empty one, no batch axis.
    """
    scheduler: Any = DDIMScheduler.from_config(
        components.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    side = resolution // components.factor
    shape = (components.unet.config["in_channels"], side, side)
    latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents = latents.to(device)
    both = {
        name: torch.stack([*[without[name]] * len(seeds), *[value] * len(seeds)]).to(device)
        for name, value in conditions.items()
    }
    for timestep in scheduler.timesteps:
        predicted = predict(torch.cat([latents, latents]), timestep.to(device), both).float()
        away, towards = predicted.chunk(2)
        step = scheduler.step(away + guidance * (towards - away), timestep, latents, return_dict=False)
        latents = step[0]
    vae = components.vae.to(device)
    with torch.autocast(torch.device(device).type, enabled=False):  # the VAE of Stable Diffusion XL overflows in fp16
        return [picture for one in latents for picture in pictures(vae.decode(one[None] / components.scale)[0])]


def draw_validation(
    predict: Predictor,
    components: Components,
    prompts: list[tuple[dict[str, Tensor], dict[str, Tensor]]],
    options: argparse.Namespace,
    device: Any,
) -> list[tuple[str, Image.Image]]:
    """Pictures of all validation prompts, from the same noise every time, named by prompt and place.

    Args:
        prompts: of each one the conditions, and those of the empty prompt.
    """
    seeds = [options.seed + place for place in range(options.num_validation_images)]
    return [
        (f"{number}-{place}", picture)
        for number, (conditions, without) in enumerate(prompts)
        for place, picture in enumerate(
            draw(
                predict,
                components,
                with_sizes(conditions, options.resolution),
                with_sizes(without, options.resolution),
                resolution=options.resolution,
                seeds=seeds,
                steps=options.num_inference_steps,
                guidance=options.guidance_scale,
                device=device,
            )
        )
    ]
