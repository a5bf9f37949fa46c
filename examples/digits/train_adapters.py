"""Train the three adapters on the frozen base: the unseen digit 9, outlined digits, slanted digits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from data import load_images, prompt_codes
from diffusers import UNet2DConditionModel
from diffusion import diffusion_loss, new_scheduler
from torch import nn
from torch.func import functional_call
from train_base import UNSEEN_DIGIT

from trlora import Adapter, AdapterSpec, adapted_modules, adapter_from_model, inject_
from trlora.training import train_, trainable_parameters

BATCH_SIZE = 64

TLORA = AdapterSpec.from_dict(
    {"transform": {"type": "tensor_ring", "rank": 2}, "residual": {"type": "tensor_ring", "rank": 5}}
)
LORA = AdapterSpec.from_dict({"transform": {"type": "identity"}, "residual": {"type": "low_rank", "rank": 9}})

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """What one adapter is and how it is trained; `unseen_share` of every batch shows the digit new to the base."""

    description: str
    kind: str
    spec: AdapterSpec
    style: str
    unseen_share: float
    steps: int
    learning_rate: float
    identity_penalty: float
    show_prompts: tuple[int, ...]


RECIPES = {
    "nine": Recipe(
        description="teaches the digit 9, which the base has never seen",
        kind="TLoRA(2,5)",
        spec=TLORA,
        style="plain",
        unseen_share=0.5,
        steps=500,
        learning_rate=5e-3,
        identity_penalty=1e-4,
        show_prompts=(9, 9, 9, 9, 9, 1, 4, 5, 7, 8),
    ),
    "outline": Recipe(
        description="draws every digit as the outline of its stroke",
        kind="TLoRA(2,5)",
        spec=TLORA,
        style="outline",
        unseen_share=0.0,
        steps=600,
        learning_rate=5e-3,
        identity_penalty=1e-4,
        show_prompts=(0, 1, 2, 3, 4, 5, 6, 7, 8),
    ),
    "slant": Recipe(
        description="draws every digit slanted by 28 degrees",
        kind="LoRA(9)",
        spec=LORA,
        style="slant",
        unseen_share=0.0,
        steps=500,
        learning_rate=5e-3,
        identity_penalty=0.0,
        show_prompts=(0, 1, 2, 3, 4, 5, 6, 7, 8),
    ),
}


def _batches(recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of images (64, 1, 16, 16) and prompts (64,); their seen digits keep what the base can do."""
    images, labels = load_images(recipe.style, "train")
    unseen, seen = (labels == UNSEEN_DIGIT).nonzero()[:, 0], (labels != UNSEEN_DIGIT).nonzero()[:, 0]
    unseen_count = round(recipe.unseen_share * BATCH_SIZE)
    for _ in range(recipe.steps):
        chosen = torch.cat(
            [
                unseen[torch.randint(len(unseen), (unseen_count,), generator=generator)],
                seen[torch.randint(len(seen), (BATCH_SIZE - unseen_count,), generator=generator)],
            ]
        )
        yield images[chosen], labels[chosen]


def train_adapter(base: UNet2DConditionModel, name: str, seed: int = 0) -> tuple[Adapter, list[float]]:
    """Train one adapter on the attention layers of a copy of the base; gives it and the loss of every step.

    A batch has far more tokens (64 images of 16x16) than a layer has features (48), so the merged weights are computed
    once a step, with gradients, and the base runs on them: equal to the factored forward pass, and faster here.
    """
    recipe = RECIPES[name]
    base = copy.deepcopy(base).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    codes, scheduler = prompt_codes(), new_scheduler()
    adapted = copy.deepcopy(base)
    inject_(adapted, recipe.spec, "attention", seed=seed)
    optimizer = torch.optim.AdamW(trainable_parameters(adapted), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        weights = {f"{path}.weight": layer.merged_weight() for path, layer in adapted_modules(model).items()}

        def merged(*inputs: torch.Tensor) -> Any:
            return functional_call(base, weights, inputs)

        return diffusion_loss(merged, scheduler, *batch, codes, generator)

    def report(step: int, value: float) -> None:
        if step % 100 == 99:
            print(f"{name}  step {step + 1}/{recipe.steps}  loss {value:.4f}", flush=True)

    losses = train_(
        adapted,
        _batches(recipe, generator),
        loss,
        optimizer,
        penalty_kind="identity",
        penalty_weight=recipe.identity_penalty,
        max_grad_norm=1.0,
        schedule=schedule,
        on_step=report,
    )
    return adapter_from_model(adapted), losses
