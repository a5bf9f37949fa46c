"""The two tasks: what is trained on, what the loss is measured on, and what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from pictures import EMPTY_PROMPT, NEW_DIGIT, SUBJECT_POOL, Split, halves, read_pictures
from runs import Task
from safetensors.torch import load_file
from torch import Tensor

SAMPLE = Path(__file__).parents[2] / "trexport" / "models" / "samples" / "digits"
BATCH_SIZE = 16
SHOTS = 8
"""Pictures of the subject that a run sees."""
PROMPT_DROPOUT = 0.1
LEVELS_PER_PICTURE = 4
DRAWN_PER_PROMPT = 12


@dataclass(frozen=True)
class Batch:
    """Noisy pictures, their levels and prompts, the velocity to predict, and the outlines; with the same leading axes."""

    noisy: Tensor
    levels: Tensor
    prompts: Tensor
    target: Tensor
    condition: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A function on every field."""
        return Batch(*(function(getattr(self, field.name)) for field in fields(self)))

    def reshaped(self, *leading: int) -> Batch:
        """The first axis as several."""
        return self.each(lambda part: part.unflatten(0, leading))


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape along a new first axis."""
    return Batch(*(torch.stack([getattr(batch, field.name) for batch in batches]) for field in fields(Batch)))


class Study:
    """One task on the sample base.

    subject: a few pictures of the digit that the base has never seen, under a prompt that it has never seen, each batch half
    of these and half pictures of the other digits (prior preservation). Each seed has pictures of its own.

    control: the picture whose outline is given, with the empty prompt, so that nothing but the outline says what to draw.
    """

    def __init__(self, task: Task, pictures: Path, device: torch.device | str = "cpu", sample: Path = SAMPLE) -> None:
        self.task: Task = task
        self.device = torch.device(device)
        base: Any = UNet2DConditionModel.from_pretrained(sample / "unet")
        self.base = base.to(self.device)
        self.scheduler: Any = DDIMScheduler.from_pretrained(sample / "scheduler")
        self.codes = load_file(sample / "prompts.safetensors")["embeddings"].to(self.device)
        self.train, test = read_pictures(pictures)
        self.choosing, self.reported = halves(test.seen)
        self.new_choosing = self.train.new.where(torch.arange(SUBJECT_POOL, len(self.train.new.labels)))
        self.new_reported = test.new

    @property
    def with_condition(self) -> bool:
        return self.task == "control"

    def batches(self, seed: int, steps: int) -> Batch:
        """All batches of one seed, the same for all its runs, first axis the step, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        seen, count = self.train.seen, steps * BATCH_SIZE
        shots = self.train.new.where(torch.randperm(SUBJECT_POOL, generator=generator)[:SHOTS])
        others = seen.where(torch.randint(len(seen.labels), (count,), generator=generator))
        if self.task == "subject":
            chosen = shots.where(torch.randint(SHOTS, (count,), generator=generator))
            first_half = torch.arange(count) % BATCH_SIZE < BATCH_SIZE // 2
            chosen = chosen.replaced_by(others, ~first_half)
            dropped = torch.rand(count, generator=generator) < PROMPT_DROPOUT
            prompts = chosen.labels.masked_fill(dropped, EMPTY_PROMPT)
        else:
            chosen, prompts = others, torch.full_like(others.labels, EMPTY_PROMPT)
        levels = torch.randint(self.scheduler.config["num_train_timesteps"], (count,), generator=generator)
        return self._batch(chosen, levels, prompts, generator).reshaped(steps, BATCH_SIZE)

    def measured(self, choosing: bool) -> dict[str, Batch]:
        """What the loss is measured on after training, by name: each picture at evenly spread noise levels.

        Args:
            choosing: the pictures that choose learning rates, or else those that are reported; neither is trained on.
        """
        seen, new = (self.choosing, self.new_choosing) if choosing else (self.reported, self.new_reported)
        if self.task == "subject":
            return {"subject": self._measured(new, None), "prior": self._measured(seen, None)}
        return {"control": self._measured(seen, EMPTY_PROMPT)}

    def drawn(self) -> tuple[Tensor, Tensor]:
        """What is drawn: prompts (N,), and the outlines to follow (N, 1, 16, 16), which `control` alone looks at.

        subject: as many pictures of the new digit as of all others together. control: the reported pictures' outlines.
        """
        if self.task == "subject":
            seen = torch.tensor([digit for digit in range(10) if digit != NEW_DIGIT]).repeat_interleave(
                DRAWN_PER_PROMPT
            )
            prompts = torch.cat([torch.full_like(seen, NEW_DIGIT), seen])
            return prompts, torch.zeros(len(prompts), 1, 16, 16)
        return torch.full_like(self.reported.labels, EMPTY_PROMPT), self.reported.outline

    def _measured(self, split: Split, prompt: int | None) -> Batch:
        generator = torch.Generator().manual_seed(7)
        count, top = len(split.labels), self.scheduler.config["num_train_timesteps"]
        repeated = split.where(torch.arange(count).repeat_interleave(LEVELS_PER_PICTURE))
        places = torch.arange(LEVELS_PER_PICTURE).repeat(count) + torch.rand(len(repeated.labels), generator=generator)
        levels = (places * top / LEVELS_PER_PICTURE).long().clamp(max=top - 1)
        prompts = repeated.labels if prompt is None else torch.full_like(repeated.labels, prompt)
        return self._batch(repeated, levels, prompts, generator)

    def _batch(self, split: Split, levels: Tensor, prompts: Tensor, generator: torch.Generator) -> Batch:
        noise = torch.randn(split.plain.shape, generator=generator)
        noisy = self.scheduler.add_noise(split.plain, noise, levels)
        target = self.scheduler.get_velocity(split.plain, noise, levels)
        return Batch(noisy, levels, prompts, target, split.outline)
