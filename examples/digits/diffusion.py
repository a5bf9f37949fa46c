"""What training and drawing share: the noise schedule, the loss, and DDIM sampling with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from data import EMPTY_PROMPT, IMAGE_SIZE
from diffusers import DDIMScheduler, UNet2DConditionModel

GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 20
PROMPT_DROPOUT = 0.1


def new_scheduler() -> DDIMScheduler:
    """A thousand cosine noise levels, velocity prediction.

    Nothing is clipped while drawing: guidance pushes the black background below -1 on the way, and clipping only the
    predicted image, not the noise that belongs to it, makes the two contradict each other.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def diffusion_loss(
    unet: Callable[..., Any],
    scheduler: DDIMScheduler,
    images: torch.Tensor,
    prompts: torch.Tensor,
    codes: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity at random noise levels, 10 % of the prompts replaced by "".

    images (N, 1, 16, 16), prompts (N,) rows of codes (11, 3, 32); the result is a scalar.
    """
    count = len(images)
    noise = torch.randn(images.shape, generator=generator)
    levels: Any = torch.randint(scheduler.config["num_train_timesteps"], (count,), generator=generator)
    dropped = torch.rand(count, generator=generator) < PROMPT_DROPOUT
    context = codes[prompts.masked_fill(dropped, EMPTY_PROMPT)]
    predicted = unet(scheduler.add_noise(images, noise, levels), levels, context).sample
    return torch.nn.functional.mse_loss(predicted, scheduler.get_velocity(images, noise, levels))


@torch.inference_mode()
def draw(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    prompts: torch.Tensor,
    codes: torch.Tensor,
    seed: int,
    steps: int = NUM_INFERENCE_STEPS,
    batch_size: int = 32,
) -> torch.Tensor:
    """Draw one image (1, 16, 16) in [-1, 1] for each prompt (N,), a row of codes (11, 3, 32); gives (N, 1, 16, 16)."""
    unet.eval()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    scheduler.set_timesteps(steps)
    levels: Any = scheduler.timesteps
    drawn = []
    for images, rows in zip(noise.split(batch_size), prompts.split(batch_size), strict=True):
        context = torch.cat([codes[EMPTY_PROMPT].expand(len(rows), -1, -1), codes[rows]])
        for level in levels:
            unguided, guided = unet(torch.cat([images, images]), level, context).sample.chunk(2)
            velocity = unguided + GUIDANCE_SCALE * (guided - unguided)
            images = scheduler.step(velocity, level, images, return_dict=False)[0]
        drawn.append(images.clamp(-1, 1))
    return torch.cat(drawn)
