"""Draw pictures with exported pipelines in optimum, and the same with diffusers.

`draw.py BASE MERGED OUT.npz WAYS EXPORTED…`: EXPORTED are folders of `trexport onnx`, BASE the pipeline they come from,
MERGED the UNet or transformer of `trexport merge`, WAYS `one` or `one,two`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from optimum.onnxruntime import (  # pyright: ignore[reportMissingImports]
    ORTDiffusionPipeline,
    ORTStableDiffusion3Pipeline,
    ORTStableDiffusionPipeline,
    ORTStableDiffusionXLPipeline,
)

KINDS = {
    "StableDiffusionPipeline": (ORTStableDiffusionPipeline, "unet", UNet2DConditionModel),
    "StableDiffusionXLPipeline": (ORTStableDiffusionXLPipeline, "unet", UNet2DConditionModel),
    "StableDiffusion3Pipeline": (ORTStableDiffusion3Pipeline, "transformer", SD3Transformer2DModel),
}

WAYS: dict[str, dict[str, Any]] = {
    "one": {"prompt": "the cat dog", "height": 32, "width": 32},
    # another size, a batch, no guidance
    "two": {"prompt": ["the cat", "a dog"], "height": 16, "width": 48, "guidance_scale": 1.0},
}


def draw(pipe: Any, way: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, num_inference_steps=3, output_type="np", **WAYS[way]).images


def main(base: str, merged: str, out: str, ways: str, *exported: str) -> None:
    index = json.loads((Path(base) / "model_index.json").read_bytes())
    without: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    kind, part, own = KINDS[index["_class_name"]]
    plain = DiffusionPipeline.from_pretrained(base, **without)
    adapted = DiffusionPipeline.from_pretrained(base, **without | {part: own.from_pretrained(merged)})
    pipes = {"plain": plain, "adapted": adapted}
    for folder in exported:
        pipes[Path(folder).name] = kind.from_pretrained(folder, provider="CPUExecutionProvider")
        assert type(ORTDiffusionPipeline.from_pretrained(folder, provider="CPUExecutionProvider")) is kind
    drawn: dict[str, Any] = {
        f"{way}_{name}": draw(pipe, way) for way in ways.split(",") for name, pipe in pipes.items()
    }
    np.savez(out, **drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
