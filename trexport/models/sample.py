"""The trained sample that ships in the package: its prompts and how it is meant to draw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import safetensors.torch
from torch import Tensor

from trexport.models.base import Base
from trexport.models.diffusion import Denoising


@final
@dataclass(frozen=True)
class Sample:
    """What `sample.json` and `prompts.safetensors` of a sample say."""

    prompts: Tensor
    """(prompts, tokens, width); the last is the empty prompt."""
    image_size: int
    names: Sequence[str]
    denoising: Denoising
    adapters: Mapping[str, Mapping[str, Any]]


def sample_of(base: Base, steps: int | None = None) -> Sample | None:
    """The sample that a base is, None for any other base.

    Args:
        steps: of the denoising; None for the sample's own number.
    """
    if base.folder is None or not (base.folder / "sample.json").is_file():
        return None
    return _read(base.folder, steps)


def _read(folder: Path, steps: int | None) -> Sample:
    fields = json.loads((folder / "sample.json").read_bytes())
    prompts = safetensors.torch.load_file(folder / "prompts.safetensors")["embeddings"]
    denoising = replace(
        Denoising.of_folder(folder, steps or fields["num_inference_steps"]),
        guidance=fields["guidance_scale"],
        unconditional=prompts[-1],
    )
    return Sample(prompts, fields["image_size"], fields["prompts"], denoising, fields["adapters"])
