"""A VAE's decoder beside the denoising loop, here a few operators whose result is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.trexport.helpers import copy_of
from trexport.artifact import Artifact
from trexport.deploy.names import PROMPT
from trexport.deploy.options import TritonOptions
from trexport.deploy.serve.decoder import Decoder
from trexport.deploy.serve.image import Order, Painter
from trexport.deploy.triton import write_triton


def write_decoder(folder: Path, element: int = TensorProto.FLOAT) -> Path:
    """Three channels, each the first of the latents, doubled."""
    folder.mkdir(parents=True)
    axes = ["batch", 4, "height", "width"]
    values = (("zero", 0), ("one", 1), ("channels", 1))
    nodes = [
        helper.make_node("Slice", ["latent_sample", "zero", "one", "channels"], ["first"]),
        helper.make_node("Concat", ["first"] * 3, ["three"], axis=1),
        helper.make_node("Add", ["three", "three"], ["sample"]),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("latent_sample", element, axes)],
        [helper.make_tensor_value_info("sample", element, ["batch", 3, "height", "width"])],
        [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in values],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"scaling_factor": 0.5, "shift_factor": 0.25}))
    return folder


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_latents_are_scaled_and_shifted(tmp_path: Path, element: int) -> None:
    decoder = Decoder(write_decoder(tmp_path / "vae_decoder", element))
    latents = torch.randn(2, 4, 6, 10)
    expected = 2 * (latents[:, :1] / 0.5 + 0.25)
    found = decoder(latents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.expand(2, 3, 6, 10), rtol=0, atol=1e-2)


def test_a_pipelines_decoder_draws_the_picture(tmp_path: Path, swappable: Artifact) -> None:
    copy_of(swappable.folder, tmp_path / "artifact")
    write_decoder(tmp_path / "artifact" / "vae_decoder")
    artifact = replace(swappable, folder=tmp_path / "artifact")
    write_triton(artifact, tmp_path / "repository", TritonOptions())
    version = tmp_path / "repository" / "unet_image" / "1"
    assert (
        'output { name: "images", data_type: TYPE_FP32, dims: [3, -1, -1] }'
        in (version.parent / "config.pbtxt").read_text()
    )
    painter = Painter.of_folder(version, lambda feeds, adapters, strengths: torch.zeros_like(feeds["sample"]))
    noise = torch.randn(1, 4, 8, 8)
    asked = {PROMPT: torch.zeros(1, 5, 32), "latents": noise, "guidance_scale": torch.ones(1, 1)}
    images = painter.paint(Order(asked | {"num_inference_steps": torch.ones(1, 1)}))["images"]
    assert images.shape[1:] == (3, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
