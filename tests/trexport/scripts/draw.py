"""Draw one picture with an exported pipeline in optimum, and the same with diffusers: `draw.py EXPORTED BASE MERGED OUT.npz`.

EXPORTED is a folder of `trexport onnx`, BASE the pipeline it comes from, MERGED the UNet of `trexport merge`.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from optimum.onnxruntime import ORTDiffusionPipeline, ORTStableDiffusionPipeline, ORTStableDiffusionXLPipeline


def draw(pipe: DiffusionPipeline, **how: object) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, num_inference_steps=3, output_type="np", **how).images  # type: ignore[operator]


def main(exported: str, base: str, merged: str, out: str) -> None:
    plain = DiffusionPipeline.from_pretrained(base)
    adapted = DiffusionPipeline.from_pretrained(base, unet=UNet2DConditionModel.from_pretrained(merged))
    kind = ORTStableDiffusionXLPipeline if "XL" in type(plain).__name__ else ORTStableDiffusionPipeline
    mine = kind.from_pretrained(exported, provider="CPUExecutionProvider")
    assert type(ORTDiffusionPipeline.from_pretrained(exported, provider="CPUExecutionProvider")) is kind
    one = {"prompt": "the cat dog", "height": 32, "width": 32}
    # another size, a batch, no guidance
    two = {"prompt": ["the cat", "a dog"], "height": 16, "width": 48, "guidance_scale": 1.0}
    np.savez(
        out,
        **{f"{name}_{who}": draw(pipe, **how)
           for name, how in (("one", one), ("two", two))
           for who, pipe in (("mine", mine), ("adapted", adapted), ("plain", plain))},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
