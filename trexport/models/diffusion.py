"""A whole denoising trajectory with any step of a model that denoises."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor

from trexport.errors import BaseError
from trexport.models.architectures import Architecture, Sampling
from trexport.models.architectures.unet import STABLE_DIFFUSION, UNet
from trexport.progress import SILENT, Progress

DenoisingStep = Callable[[Mapping[str, Tensor]], Tensor]
"""Feeds by name → the model's output."""


@final
@dataclass(frozen=True)
class Denoising:
    """How to get from noise to an image: without noise of its own, so that only the model makes a difference.

    `guidance` above 1 runs every sample twice, with `unconditional` beside its own conditioning.
    """

    scheduler: Mapping[str, Any]
    steps: int
    guidance: float = 1.0
    unconditional: Tensor | None = None
    """(tokens, width), where `guidance` is above 1."""
    sampling: Sampling = STABLE_DIFFUSION
    """What steps, and what it steps."""
    timestep_scale: float = 1.0
    """What the scheduler's timesteps are multiplied by for the model."""

    @classmethod
    def of_folder(cls, folder: Path | None, steps: int, architecture: type[Architecture] = UNet) -> Self:
        """With the scheduler of a pipeline's folder, the architecture's own where there is none.

        Args:
            architecture: one that denoises.

        Raises:
            BaseError: the scheduler's config cannot be read.
        """
        sampling = architecture.sampling
        assert sampling is not None
        file = folder / "scheduler" / "scheduler_config.json" if folder is not None else None
        config = sampling.config
        if file is not None and file.is_file():
            try:
                config = json.loads(file.read_bytes())
            except ValueError as error:
                raise BaseError(f"{file}: not JSON ({error})") from error
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        return cls(given, steps, sampling=sampling, timestep_scale=architecture.timestep_scale)

    def run(
        self, model: DenoisingStep, noise: Tensor, feeds: Mapping[str, Tensor], *, progress: Progress = SILENT
    ) -> Tensor:
        """Denoise.

        Args:
            model: one step.
            noise: of the shape of the latents, (batch, …), N(0, 1).
            feeds: the other inputs of the model (`encoder_hidden_states`, …), in the dtype that it takes.

        Returns:
            The final sample, float32, shape of `noise`.
        """
        scheduler = self._scheduler()
        latents = self.sampling.latents
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
                # the trajectory is kept in float32; only the model runs in its own precision
                given = torch.cat([sample, sample]) if guided else sample
                timestep = t.to(torch.float32) * self.timestep_scale
                fed = {**feeds, latents: given.to(dtype), "timestep": timestep}
                output = model(fed).float().to(sample.device)
                if guided:
                    free_part, conditioned = output.chunk(2)
                    output = free_part + self.guidance * (conditioned - free_part)
                sample = scheduler.step(output, t, sample).prev_sample
                task.advance(1)
        return sample

    def _scheduler(self) -> Any:
        import diffusers

        # where a pipeline shifts the steps by its picture's size, parity needs no such thing
        config = {name: value for name, value in self.scheduler.items() if name != "use_dynamic_shifting"}
        scheduler: Any = getattr(diffusers, self.sampling.method).from_config(config)
        scheduler.set_timesteps(self.steps)
        return scheduler
