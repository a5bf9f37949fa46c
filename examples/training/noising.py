"""The training target of a diffusion model: latents, noise, what is to be predicted, how much each error counts."""

from __future__ import annotations

from typing import Any

import torch
from failures import OptionError
from torch import Tensor

TARGETS = ("epsilon", "v_prediction", "sample")


def check_prediction(scheduler: Any) -> None:
    """
    Raises:
        OptionError: the scheduler's models predict something that the recipes do not train.
    """
    kind = scheduler.config.prediction_type
    if kind not in TARGETS:
        raise OptionError(f"prediction type {kind!r}, expected one of {', '.join(TARGETS)}; see --prediction_type")


def sampled(entry: dict[str, Tensor], scale: float) -> Tensor:
    """Latents from the `mean` and `std` that a VAE gave, by torch's own generator, as its diffusion model takes them."""
    return (entry["mean"] + entry["std"] * torch.randn_like(entry["mean"])) * scale


def noised(scheduler: Any, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (batch, …) with noise at random timesteps.

    Returns:
        the noisy latents, the timesteps (batch,), and what the model is to predict.
    """
    noise = torch.randn_like(latents)
    count = scheduler.config.num_train_timesteps
    timesteps = torch.randint(count, (latents.shape[0],), device=latents.device)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "sample":
        target = latents
    else:
        target = scheduler.get_velocity(latents, noise, timesteps)
    return scheduler.add_noise(latents, noise, timesteps), timesteps, target


def errors(
    predicted: Tensor, target: Tensor, scheduler: Any, timesteps: Tensor, snr_gamma: float | None = None
) -> Tensor:
    """The mean squared error of each sample, (batch,), in float32.

    With `snr_gamma` weighted by min(SNR, γ)/SNR for epsilon, /(SNR + 1) for v, and min(SNR, γ) for the sample itself
    (arXiv 2303.09556).
    """
    each = (predicted.float() - target.float()).square().flatten(1).mean(dim=1)
    if snr_gamma is None:
        return each
    kept = scheduler.alphas_cumprod.to(each.device)[timesteps].float()
    snr = kept / (1 - kept)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return each * (snr_gamma / snr).clamp(max=1)
    return each * snr.clamp(max=snr_gamma) / (snr + 1 if kind == "v_prediction" else 1)
