"""The other models of a pipeline as ONNX, against diffusers' and transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.trexport.helpers import copy_of
from tests.trexport.pipelines import VAE_WEIGHTS, edit_json, edit_weights, opened, run_session
from trexport.graph.components import components_size, export_components
from trexport.manifest import ComponentRecord
from trexport.parity.metrics import relative_l2

HIDDEN = [f"hidden_states.{i}" for i in range(4)]
STATE = ["batch_size", "sequence_length", 32]
IO = {
    "text_encoder": (
        {"input_ids": ["batch_size", "sequence_length"]},
        {"last_hidden_state": STATE, "pooler_output": ["batch_size", 32], **dict.fromkeys(HIDDEN, STATE)},
    ),
    "text_encoder_2": (
        {"input_ids": ["batch_size", "sequence_length"]},
        {"text_embeds": ["batch_size", 32], "last_hidden_state": STATE, **dict.fromkeys(HIDDEN, STATE)},
    ),
    "vae_encoder": (
        {"sample": ["batch_size", 3, "sample_height", "sample_width"]},
        {"latent_parameters": ["batch_size", 8, "sample_height / 2", "sample_width / 2"]},
    ),
    "vae_decoder": (
        {"latent_sample": ["batch_size", 4, "latent_height", "latent_width"]},
        {"sample": ["batch_size", 3, "latent_height * 2", "latent_width * 2"]},
    ),
}


@pytest.fixture(scope="module")
def exported(pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The components of the tiny Stable Diffusion XL, float32, every axis free."""
    folder = tmp_path_factory.mktemp("components")
    export_components(opened(pipelines / "sdxl"), folder, "fp32")
    return folder


@pytest.mark.parametrize("name", IO)
def test_names_and_axes_are_optimum_s(name: str, exported: Path) -> None:
    graph = onnx.load(exported / name / "model.onnx").graph

    def axes(values: list[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    found = axes(list(graph.input)), axes(list(graph.output))
    assert found == IO[name]
    assert [list(part) for part in found] == [list(part) for part in IO[name]]  # in this order


def ids(shape: tuple[int, int]) -> Tensor:
    """Prompts of random words, each with an end (519) and padding after it."""
    values = torch.randint(0, 518, shape)
    for row in range(shape[0]):
        values[row, 3 + row :] = 519
    return values


@pytest.mark.parametrize("shape", [(1, 77), (3, 9)])
@pytest.mark.parametrize(
    ("name", "kind"), [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)]
)
def test_text_encoders_equal_transformers(
    name: str, kind: type[CLIPTextModel], shape: tuple[int, int], exported: Path, pipelines: Path
) -> None:
    model = kind.from_pretrained(pipelines / "sdxl" / name)
    prompt = ids(shape)
    with torch.inference_mode():
        wanted = model(prompt, output_hidden_states=True)
    found = run_session(exported / name / "model.onnx", prompt)
    for output, value in found.items():
        expected = wanted.hidden_states[int(output[-1])] if output.startswith("hidden") else wanted[output]
        assert relative_l2(value, expected) <= 1e-6, output


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 14, 6)])
def test_the_vae_equals_diffusers(shape: tuple[int, int, int], exported: Path, pipelines: Path) -> None:
    model: Any = AutoencoderKL.from_pretrained(pipelines / "sdxl" / "vae")
    batch, height, width = shape
    picture, latents = torch.rand(batch, 3, 2 * height, 2 * width) * 2 - 1, torch.randn(batch, 4, height, width)
    with torch.inference_mode():
        encoded, decoded = model.encode(picture).latent_dist.parameters, model.decode(latents).sample
    (found,) = run_session(exported / "vae_encoder" / "model.onnx", picture).values()
    assert relative_l2(found, encoded) <= 1e-5
    (found,) = run_session(exported / "vae_decoder" / "model.onnx", latents).values()
    assert relative_l2(found, decoded) <= 1e-5


def test_initialisers_are_the_parameters_by_name_and_bit(exported: Path, pipelines: Path) -> None:
    for name, component in opened(pipelines / "sdxl").components.items():
        graph = onnx.load(exported / name / "model.onnx").graph
        held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        part = {"vae_encoder": ("encoder.", "quant"), "vae_decoder": ("decoder.", "post")}.get(name, ("",))
        weights = component.source.weights[0]
        names = [entry.name for entry in weights.entries if entry.name.startswith(part)]
        assert names
        for key in names:
            assert np.array_equal(held[key], weights.tensor(key).numpy()), key


def test_configs_are_whole(exported: Path) -> None:
    vae = json.loads((exported / "vae_decoder" / "config.json").read_text())
    assert vae["scaling_factor"] == 0.18215  # which optimum would otherwise make up
    assert (vae["force_upcast"], vae["_class_name"]) == (False, "AutoencoderKL")
    text = json.loads((exported / "text_encoder" / "config.json").read_text())
    assert (text["num_hidden_layers"], text["hidden_size"]) == (3, 32)
    assert not any("_name_or_path" in json.loads(path.read_text()) for path in exported.rglob("config.json"))


def test_fixed_axes(pipelines: Path, tmp_path: Path) -> None:
    fixed = {"batch_size": 2, "height": 6, "width": 8, "sequence_length": 5}
    records = export_components(opened(pipelines / "sd"), tmp_path, "fp32", fixed=fixed)
    shapes = {name: [list(t.axes) for t in (*r.io.inputs, *r.io.outputs)] for name, r in records.items()}
    batch = "batch_size"  # stays free: guidance doubles the UNet's alone
    assert shapes["text_encoder"] == [[batch, 5], [batch, 5, 32], [batch, 32]]
    assert shapes["vae_encoder"] == [[batch, 3, 12, 16], [batch, 8, 6, 8]]
    assert shapes["vae_decoder"] == [[batch, 4, 6, 8], [batch, 3, 12, 16]]


def test_size_is_about_what_is_written(exported: Path, pipelines: Path) -> None:
    written = sum(path.stat().st_size for path in exported.rglob("model.onnx_data"))
    assert 0.95 < components_size(opened(pipelines / "sdxl"), "fp32") / written < 1.1


# --- half precision ----------------------------------------------------------------------------------------------------


def half(folder: Path, out: Path) -> dict[str, ComponentRecord]:
    return export_components(opened(folder, "vae_encoder", "vae_decoder"), out, "fp16")


def dtypes(path: Path) -> list[int]:
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    return [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]


def test_a_vae_that_fits_is_float16(pipelines: Path, tmp_path: Path) -> None:
    records = half(pipelines / "sd", tmp_path)
    assert {name: (r.dtype, r.dtype_reason, r.opset) for name, r in records.items()} == {
        "vae_encoder": ("fp16", None, 20),
        "vae_decoder": ("fp16", None, 20),
    }
    assert dtypes(tmp_path / "vae_decoder") == [onnx.TensorProto.FLOAT16] * 2
    latents = torch.randn(1, 4, 6, 6).half()
    with torch.inference_mode():
        model: Any = AutoencoderKL.from_pretrained(pipelines / "sd" / "vae")
        wanted = model.decode(latents.float()).sample
    (found,) = run_session(tmp_path / "vae_decoder" / "model.onnx", latents).values()
    assert 1e-5 < relative_l2(found, wanted) <= 3e-3


LOUD = "decoder.mid_block.resnets.0.conv2"


def loud(tensors: dict[str, Tensor]) -> None:
    """Activations beyond float16, which the next norm takes back: float32 does not mind."""
    tensors[f"{LOUD}.weight"] *= 50000 / tensors[f"{LOUD}.weight"].abs().max()


def test_a_decoder_that_overflows_stays_in_float32(pipelines: Path, tmp_path: Path) -> None:
    folder = copy_of(pipelines / "sd", tmp_path / "sd")
    edit_weights(folder / VAE_WEIGHTS, loud)
    (tmp_path / "out").mkdir()
    records = half(folder, tmp_path / "out")
    encoder, decoder = records["vae_encoder"], records["vae_decoder"]
    assert (encoder.dtype, encoder.dtype_reason, encoder.overflow) == ("fp16", None, None)
    assert (decoder.dtype, decoder.opset) == ("fp32", 23)
    assert decoder.overflow is not None
    assert decoder.overflow["tensor"] == LOUD
    assert decoder.overflow["max_abs"] > 65504
    assert LOUD in (decoder.dtype_reason or "")
    assert ComponentRecord.from_dict(json.loads(json.dumps(decoder.to_dict()))) == decoder
    path = tmp_path / "out" / "vae_decoder"
    assert dtypes(path) == [onnx.TensorProto.FLOAT] * 2
    model: Any = AutoencoderKL.from_pretrained(folder / "vae")
    latents = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        wanted = model.decode(latents).sample
        assert not model.half().decode(latents.half()).sample.isfinite().all()  # as we say
    (found,) = run_session(path / "model.onnx", latents).values()
    assert relative_l2(found, wanted) <= 1e-5


def offset(tensors: dict[str, Tensor]) -> None:
    """A large offset that is taken back later: float16 loses the digits of what lies on it."""
    tensors["decoder.mid_block.resnets.0.conv2.bias"] += 20000
    tensors["decoder.mid_block.resnets.1.conv2.bias"] -= 20000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: edit_json(folder / "vae" / "config.json", force_upcast=True), "force_upcast"),
        (lambda folder: edit_weights(folder / VAE_WEIGHTS, offset), "relative L2"),
    ],
)
def test_other_reasons_for_float32(
    change: Callable[[Path], object], reason: str, pipelines: Path, tmp_path: Path
) -> None:
    folder = copy_of(pipelines / "sd", tmp_path / "sd")
    change(folder)
    record = export_components(opened(folder, "vae_decoder"), tmp_path, "fp16")["vae_decoder"]
    assert (record.dtype, record.overflow) == ("fp32", None)
    assert reason in (record.dtype_reason or "")


def test_brain_floats_have_float32_s_range(pipelines: Path, tmp_path: Path) -> None:
    record = export_components(opened(pipelines / "sd", "vae_decoder"), tmp_path, "bf16")["vae_decoder"]
    assert (record.dtype, record.opset) == ("bf16", 22)
    assert dtypes(tmp_path / "vae_decoder") == [onnx.TensorProto.BFLOAT16] * 2
