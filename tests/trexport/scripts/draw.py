"""Draw pictures with exported pipelines in optimum, and the same with diffusers.

`draw.py BASE MERGED OUT.npz WAYS EXPORTED…`: EXPORTED are folders of `trexport onnx`, BASE the pipeline they come from,
MERGED the UNet of `trexport merge`, WAYS `one` or `one,two`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from optimum.onnxruntime import ORTDiffusionPipeline, ORTStableDiffusionPipeline, ORTStableDiffusionXLPipeline  # pyright: ignore[reportMissingImports]

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
    plain = DiffusionPipeline.from_pretrained(base)
    adapted = DiffusionPipeline.from_pretrained(base, unet=UNet2DConditionModel.from_pretrained(merged))
    kind = ORTStableDiffusionXLPipeline if "XL" in type(plain).__name__ else ORTStableDiffusionPipeline
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
