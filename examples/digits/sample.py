"""The sample's folder in the package (`sample:digits`): writing its parts, reading them back."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from data import IMAGE_SIZE, PROMPTS, prompt_codes
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusion import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, new_scheduler
from train_adapters import RECIPES

from trlora import Adapter, load_adapter, save_adapter

SAMPLE = Path(__file__).parents[2] / "trexport" / "models" / "samples" / "digits"


def write_base(unet: UNet2DConditionModel, folder: Path = SAMPLE) -> None:
    """Write the UNet, its scheduler, its prompts, and the description of it all."""
    unet.save_pretrained(folder / "unet")
    new_scheduler().save_pretrained(folder / "scheduler")
    safetensors.torch.save_file({"embeddings": prompt_codes()}, folder / "prompts.safetensors")
    description = {
        "name": "digits",
        "image_size": IMAGE_SIZE,
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "prompts": list(PROMPTS),
        "adapters": {
            name: {"description": recipe.description, "kind": recipe.kind, "show_prompts": list(recipe.show_prompts)}
            for name, recipe in RECIPES.items()
        },
    }
    (folder / "sample.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    _readable_by_all(folder)


def write_adapter(name: str, adapter: Adapter, folder: Path = SAMPLE) -> None:
    """Write one adapter's folder in place of what was there."""
    save_adapter(adapter, folder / "adapters" / name, overwrite=True)
    _readable_by_all(folder)


def _readable_by_all(folder: Path) -> None:
    """safetensors makes files for one user; what ships is for all."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def read_base(folder: Path = SAMPLE) -> tuple[UNet2DConditionModel, DDIMScheduler, torch.Tensor]:
    """The UNet, its scheduler, and the prompt codes (11, 3, 32)."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert isinstance(scheduler, DDIMScheduler)
    codes = safetensors.torch.load_file(folder / "prompts.safetensors")["embeddings"]
    return unet, scheduler, codes


def read_adapter(name: str, folder: Path = SAMPLE) -> Adapter:
    """One of the sample's adapters."""
    return load_adapter(folder / "adapters" / name)
