"""The parts of a pipeline that a recipe needs: a folder of diffusers, a Hub id, or `random:NAME`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from failures import OptionError, RecipeError
from random_parts import random_encoders, random_vae
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from trexport.models.base import looks_like_hub_id, open_base

transformers.utils.logging.disable_progress_bar()

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Components:
    """Of one pipeline; all models frozen, in evaluation mode, on the CPU, in float32 but for the UNet."""

    name: str
    unet: Any
    """A `UNet2DConditionModel`."""
    vae: Any
    """An `AutoencoderKL`."""
    encoders: list[tuple[Any, Any]]
    """Tokenizers and text encoders."""
    scheduler: Any
    """A `DDPMScheduler`."""
    zero_negative: bool = False
    """Whether zeros stand for the empty prompt when pictures are drawn, as Stable Diffusion XL was trained."""

    @property
    def sdxl(self) -> bool:
        """Whether the UNet also takes pooled embeddings and sizes, as Stable Diffusion XL's does."""
        return self.unet.config["addition_embed_type"] == "text_time"

    @property
    def scale(self) -> float:
        """Of latents, from the VAE's to the UNet's."""
        return self.vae.config["scaling_factor"]

    @property
    def factor(self) -> int:
        """Pixels to a latent, on a side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def check_resolution(self, resolution: int) -> None:
        """
        Raises:
            OptionError: squares that the UNet cannot halve often enough.
        """
        step = self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if resolution % step:
            raise OptionError(f"--resolution is {resolution}, {self.name} takes multiples of {step}")

    def free_encoders(self) -> None:
        """Give back the memory of the text encoders; their embeddings are cached."""
        self.encoders = []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_components(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Components:
    """
    Args:
        revision, variant: as of `from_pretrained`.
        prediction_type: other than the scheduler says.
        dtype: of the UNet.

    Raises:
        OptionError: nothing of that name, or a model that the recipes do not know.
        RecipeError: a part is missing or cannot be read.
    """
    if name.startswith("random:"):
        unet, zero = _random_unet(name), False
        vae, encoders = random_vae(unet.config), random_encoders(unet.config)
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    else:
        unet, vae, encoders, scheduler = _stored(name, revision, variant)
        index: Any = DiffusionPipeline.load_config(name, revision=revision)
        zero = bool(index.get("force_zeros_for_empty_prompt", False))
    if prediction_type is not None:
        scheduler.register_to_config(prediction_type=prediction_type)
    found = Components(name, unet, vae, encoders, scheduler, zero)
    _check(found)
    models: list[Any] = [unet, vae, *(encoder for _, encoder in encoders)]
    for model in models:
        model.requires_grad_(False).eval().to(dtype=dtype if model is unet else torch.float32)
    return found


def _random_unet(name: str) -> Any:
    """The UNet that `trexport merge random:NAME …` has, bit for bit."""
    base = open_base(name)
    if base.config["_class_name"] != "UNet2DConditionModel":
        raise OptionError(f"{name}: a {base.config['_class_name']}, expected a UNet; try random:sd15 or random:sdxl")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(base.config))
    state = {entry.name: file.tensor(entry.name) for file in base.weights for entry in file.entries}
    unet.load_state_dict(state, assign=True)
    return unet


def _stored(name: str, revision: str | None, variant: str | None) -> tuple[Any, Any, list[tuple[Any, Any]], Any]:
    folder = Path(name)
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise OptionError(
                f"{name}: no model_index.json inside; training needs a whole pipeline (unet, vae, text_encoder, tokenizer, "
                "scheduler), as save_pretrained of a diffusers pipeline writes it"
            )
    elif not looks_like_hub_id(name):
        raise OptionError(
            f"{name}: no such folder; expected a diffusers pipeline's folder, a Hub id (owner/name), or random:NAME"
        )

    def part(kind: Callable[..., Any], subfolder: str, **more: Any) -> Any:
        try:
            return kind(name, subfolder=subfolder, revision=revision, **more)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RecipeError(f"{name}: {subfolder} cannot be loaded ({reason})") from error

    stored = {"variant": variant, "use_safetensors": True}
    unet = part(UNet2DConditionModel.from_pretrained, "unet", **stored)
    vae = part(AutoencoderKL.from_pretrained, "vae", **stored)
    scheduler = part(DDPMScheduler.from_pretrained, "scheduler")
    encoders = [
        (
            part(AutoTokenizer.from_pretrained, "tokenizer"),
            part(CLIPTextModel.from_pretrained, "text_encoder", **stored),
        )
    ]
    if unet.config["addition_embed_type"] == "text_time":
        second = part(CLIPTextModelWithProjection.from_pretrained, "text_encoder_2", **stored)
        encoders.append((part(AutoTokenizer.from_pretrained, "tokenizer_2"), second))
    return unet, vae, encoders, scheduler


def _check(found: Components) -> None:
    channels, latents = found.unet.config["in_channels"], found.vae.config["latent_channels"]
    if channels != latents:
        raise OptionError(
            f"{found.name}: the UNet takes {channels} channels and the VAE makes {latents}, so it is made for inpainting or "
            "the like; expected a text-to-image pipeline"
        )
    widths = sum(encoder.config.hidden_size for _, encoder in found.encoders)
    if found.unet.config["cross_attention_dim"] != widths:
        raise OptionError(
            f"{found.name}: text states {widths} wide, and the UNet takes {found.unet.config['cross_attention_dim']}; "
            "expected a pipeline of Stable Diffusion 1.x, 2.x or XL"
        )
