"""A whole denoising trajectory with any UNet step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor

from trexport.errors import BaseError
from trexport.progress import SILENT, Progress

UNetStep = Callable[[Mapping[str, Tensor]], Tensor]
"""Feeds by name → the UNet's output."""

# Stable Diffusion's own, for a UNet that comes without a scheduler
_STABLE_DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


@final
@dataclass(frozen=True)
class Denoising:
    """How to get from noise to an image: DDIM, without noise of its own, so that only the UNet makes a difference.

    `guidance` above 1 runs every sample twice, with `unconditional` beside its own conditioning.
    """

    scheduler: Mapping[str, Any]
    steps: int
    guidance: float = 1.0
    unconditional: Tensor | None = None
    """(tokens, width), where `guidance` is above 1."""

    @classmethod
    def of_folder(cls, folder: Path | None, steps: int) -> Self:
        """With the scheduler of a pipeline's folder, Stable Diffusion's where there is none.

        Raises:
            BaseError: the scheduler's config cannot be read.
        """
        file = folder / "scheduler" / "scheduler_config.json" if folder is not None else None
        if file is None or not file.is_file():
            return cls(_STABLE_DIFFUSION, steps)
        try:
            config = json.loads(file.read_bytes())
        except ValueError as error:
            raise BaseError(f"{file}: not JSON ({error})") from error
        return cls({name: value for name, value in config.items() if not name.startswith("_")}, steps)

    def run(self, unet: UNetStep, noise: Tensor, feeds: Mapping[str, Tensor], *, progress: Progress = SILENT) -> Tensor:
        """Denoise.

        Args:
            unet: one step.
            noise: (batch, channels, height, width), N(0, 1).
            feeds: the other inputs of the UNet (`encoder_hidden_states`, …), in the dtype that it takes.

        Returns:
            The final sample, float32, shape of `noise`.
        """
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(dict(self.scheduler))
        assert isinstance(scheduler, DDIMScheduler)
        scheduler.set_timesteps(self.steps)
        dtype = feeds["encoder_hidden_states"].dtype
        context = feeds["encoder_hidden_states"]
        guided = self.guidance > 1 and self.unconditional is not None
        if guided and self.unconditional is not None:
            free = self.unconditional.to(context).expand_as(context)
            feeds = {name: torch.cat([tensor, tensor]) for name, tensor in feeds.items() if name != "timestep"}
            feeds["encoder_hidden_states"] = torch.cat([free, context])
        sample = noise.float()
        with progress.task("denoise", self.steps) as task:
            for t in scheduler.timesteps:
                # the trajectory is kept in float32; only the UNet runs in its own precision
                given = torch.cat([sample, sample]) if guided else sample
                given = given.to(dtype)
                output = unet({**feeds, "sample": given, "timestep": t.to(torch.float32)}).float().to(sample.device)
                if guided:
                    free_part, conditioned = output.chunk(2)
                    output = free_part + self.guidance * (conditioned - free_part)
                sample = scheduler.step(output, int(t), sample).prev_sample  # type: ignore[union-attr]
                task.advance(1)
        return sample
