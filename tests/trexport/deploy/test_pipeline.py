"""A whole pipeline laid out for Triton draws what diffusers' own pipeline draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trexport.pipelines import opened
from trexport.artifact import open_artifact
from trexport.deploy.names import NEGATIVE, PROMPT
from trexport.deploy.options import TritonOptions
from trexport.deploy.serve.image import Order, Painter
from trexport.deploy.triton import write_triton
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.base import open_base
from trexport.session import Session


@pytest.mark.slow
def test_the_picture_is_diffusers_own(pipelines: Path, tmp_path: Path) -> None:
    """DDIM, guidance, the VAE's scaling and the step to [0, 1], from the same embeddings and noise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = pipelines / "sd"
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    width, channels = pipeline.unet.config.cross_attention_dim, pipeline.unet.config.in_channels
    size = pipeline.unet.config.sample_size
    prompts, negative = torch.randn(2, 7, width), torch.randn(2, 7, width)
    noise = torch.randn(2, channels, size, size)
    wanted = pipeline(
        prompt_embeds=prompts,
        negative_prompt_embeds=negative,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images

    base = open_base(str(folder))
    # the batch stays free: guidance doubles it
    options = ExportOptions(timestep_per_sample=True, fixed={"height": size, "width": size, "sequence_length": 7})
    export_onnx(base, [], tmp_path / "onnx", options, pipeline=opened(folder, "vae_decoder"))
    artifact = open_artifact(tmp_path / "onnx")
    plan = write_triton(artifact, tmp_path / "repository", TritonOptions())
    assert [config.backend for config in plan.configs] == ["onnxruntime", "python"]
    with Session(artifact) as session:

        def call(feeds: Mapping[str, Tensor], names: Sequence[Sequence[str]] | None, scales: Tensor | None) -> Tensor:
            return session.run({**feeds, "timestep": feeds["timestep"].flatten()})["out_sample"]

        painter = Painter.of_folder(tmp_path / "repository" / "unet_image" / "1", call)
        asked = {PROMPT: prompts, NEGATIVE: negative, "latents": noise}
        asked |= {"num_inference_steps": torch.full((2, 1), 4), "guidance_scale": torch.full((2, 1), 3.0)}
        found = painter.paint(Order(asked))["images"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
