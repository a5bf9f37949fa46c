"""Validation covers a pipeline's other models: equal ones pass, a wrong weight or a NaN in one does not."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.trexport.helpers import copy_of, run_cli
from tests.trexport.pipelines import STATIC, VAE_WEIGHTS, edit_weights
from trexport.artifact import open_artifact
from trexport.errors import ArtifactError
from trexport.io_spec import Dtype
from trexport.models.base import open_base
from trexport.parity.components import compare_components, judge_components
from trexport.parity.report import ComponentParity
from trexport.parity.tolerance import TOLERANCES
from trexport.parity.validate import ValidateOptions, validate

Tensors = dict[str, Tensor]
QUICK = ["--timesteps", "5", "--seeds", "1", "--trajectory-steps", "0", "--no-locate"]


@pytest.fixture(scope="module")
def artifact(pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion, whole, float16, static, an adapter merged in."""
    out = tmp_path_factory.mktemp("artifact") / "sd"
    command = [
        "onnx",
        str(pipelines / "sd"),
        "random:tlora:2:6",
        "-o",
        str(out),
        "--dtype",
        "fp16",
        "--static",
        *STATIC,
    ]
    assert run_cli(command) == 0
    return out


def test_every_output_is_compared_and_reported(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["validate", artifact, *QUICK, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {(entry["component"], entry["output"]): entry for entry in report["components"]}
    assert list(found) == [
        ("text_encoder", "last_hidden_state"),
        ("text_encoder", "pooler_output"),
        ("vae_encoder", "latent_parameters"),
        ("vae_decoder", "sample"),
    ]
    for entry in found.values():
        assert entry["dtype"] == "fp16"
        assert entry["limit"] == TOLERANCES["fp16"].relative_l2
        assert 1e-6 < entry["relative_l2"] <= entry["limit"]
        assert entry["cases"] == 2  # two shapes, for the batch is free
    assert run_cli(["validate", artifact, *QUICK]) == 0
    assert "text_encoder: pooler_output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "key"), [("vae_decoder", "decoder.conv_out.bias"), ("text_encoder", "final_layer_norm.bias")]
)
@pytest.mark.parametrize("change", [0.3, math.nan])
def test_a_wrong_weight_fails(
    name: str, key: str, change: float, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(artifact, tmp_path / "x")
    path = folder / name / "model.onnx"
    model = onnx.load(path)
    (tensor,) = [i for i in model.graph.initializer if i.name.endswith(key)]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[1] += change
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name))
    onnx.save(model, path)
    damaged = open_artifact(folder, verify=False)
    base, _ = damaged.sources()
    found = compare_components(damaged, damaged.pipeline(base), [], "cpu", range(1))
    failures = judge_components(found)
    assert failures
    assert all(failure.startswith(f"{name}: ") for failure in failures)
    assert run_cli(["validate", folder, *QUICK]) == 1  # the hash says so before anything runs
    assert "changed or damaged" in capsys.readouterr().err


def test_parity_not_met_is_exit_code_3(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = dataclasses.replace(TOLERANCES["fp16"], relative_l2=1e-9)
    monkeypatch.setitem(TOLERANCES, "fp16", tight)
    limit = ["--max-relative-l2", "3e-3"]  # the UNet's own
    assert run_cli(["validate", artifact, *QUICK, *limit]) == 3
    error = capsys.readouterr().err
    assert "vae_decoder: relative L2 of sample" in error
    assert "of a step" not in error


@pytest.mark.parametrize("value", [math.nan, math.inf, 2e-3])
def test_no_number_that_is_not_within_the_limit_is_judged_good(value: float) -> None:
    entry = ComponentParity("vae_decoder", "sample", "fp32", 2, 1e-3, 0.1, 1e-3)
    assert judge_components([entry]) == []
    assert len(judge_components([entry, dataclasses.replace(entry, relative_l2=value)])) == 1


@pytest.mark.parametrize(("effect", "good"), [(0.1, True), (1e-3, False), (1e-5, False), (math.nan, False)])
def test_adapters_must_move_a_model_by_more_than_its_error(effect: float, good: bool) -> None:
    """By one of its outputs at least."""
    still = ComponentParity("text_encoder", "pooler_output", "fp32", 2, 5e-4, 0.1, 1e-3, effect=0.0)
    moved = dataclasses.replace(still, output="last_hidden_state", effect=effect)
    assert (judge_components([still, moved]) == []) == good


TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def merged(
    base: Path,
    out: Path,
    *arguments: str,
    strength: float = 1.0,
    tensors: Tensors | None = None,
    others: Sequence[str] = (),
) -> Path:
    """A merged pipeline of an adapter that is on a text encoder only, on a layer of it unless `tensors` are given, and of
    others."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 32), "B": (32, 2)}
    lora = {f"{TEXT}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in shapes.items()}
    file = out.with_name("a.safetensors")
    safetensors.torch.save_file(tensors or lora, file)
    assert run_cli(["merge", base, f"{file}={strength}", *others, "-o", out, *arguments]) == 0
    return out


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_of_a_merged_pipeline_text_encoders_are_compared(
    dtype: Dtype, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = merged(pipelines / "sd", tmp_path / "out", "--dtype", dtype)
    capsys.readouterr()
    assert run_cli(["validate", folder, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["components"]
    assert [entry["output"] for entry in found] == ["last_hidden_state", "pooler_output"]
    for entry in found:
        assert (entry["component"], entry["dtype"], entry["cases"]) == ("text_encoder", dtype, 2)
        assert entry["relative_l2"] <= entry["limit"] == TOLERANCES[dtype].relative_l2
        assert entry["effect"] > 0.01
    assert run_cli(["validate", folder, *QUICK]) == 0
    assert "text_encoder: pooler_output" in capsys.readouterr().out


def test_offsets_of_a_text_encoder_are_an_effect(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_te_text_model_encoder_layers_0_layer_norm1"
    change = {f"{name}.w_norm": torch.linspace(-1, 1, 32), f"{name}.b_norm": torch.linspace(0, 1, 32)}
    folder = merged(pipelines / "sd", tmp_path / "out", tensors=change)
    capsys.readouterr()
    assert run_cli(["validate", folder, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["components"]
    assert [entry["effect"] > 0.01 for entry in found] == [True, True]


def test_a_text_encoder_that_lacks_the_adapter_fails(pipelines: Path, tmp_path: Path) -> None:
    folder = merged(pipelines / "sd", tmp_path / "out")
    weights = "text_encoder/model.safetensors"
    (folder / weights).write_bytes((pipelines / "sd" / weights).read_bytes())
    artifact = open_artifact(folder, verify=False)
    options = ValidateOptions(timesteps=[5], seeds=[0], trajectory_steps=0, locate=False)
    report = validate(artifact, *artifact.sources(), "cpu", options)
    assert report.failures
    assert all(failure.startswith("text_encoder: relative L2 of ") for failure in report.failures)


@pytest.mark.parametrize(("strength", "says"), [(0.0, "nothing was compared"), (1e-7, "text_encoder: .* move")])
def test_an_adapter_that_does_nothing_fails(
    strength: float, says: str, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = merged(pipelines / "sd", tmp_path / "out", strength=strength)
    assert run_cli(["validate", folder, *QUICK]) == 3
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("strength", "on_unet", "says"),
    [
        (1.0, 0.0, None),
        (0.0, 1.0, None),
        (0.0, 0.0, "every adapter has strength 0"),
        (1e-7, 0.0, "text_encoder: .* move"),
    ],
)
def test_an_adapter_without_strength_is_no_failure_where_another_is_shown(
    strength: float,
    on_unet: float,
    says: str | None,
    pipelines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = [f"random:tlora:2:6={on_unet}"]
    folder = merged(pipelines / "sd", tmp_path / "out", strength=strength, others=others)
    assert run_cli(["validate", folder, *QUICK]) == (3 if says else 0)
    assert says is None or re.search(says, capsys.readouterr().err)


def test_another_text_encoder_than_it_was_made_from_is_refused(pipelines: Path, tmp_path: Path) -> None:
    base = copy_of(pipelines / "sd", tmp_path / "sd")
    folder = merged(base, tmp_path / "out")
    edit_weights(base / "text_encoder" / "model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1e-3))
    with pytest.raises(ArtifactError, match=r"sd/text_encoder: not what .* hash differs"):
        open_artifact(folder).pipeline(open_base(str(base)))


def test_another_vae_than_it_was_made_from_is_refused(artifact: Path, pipelines: Path, tmp_path: Path) -> None:
    folder = copy_of(pipelines / "sd", tmp_path / "sd")
    edit_weights(folder / VAE_WEIGHTS, lambda tensors: tensors["decoder.conv_out.bias"].add_(1e-3))
    opened = open_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"sd/vae: not what .* hash differs"):
        opened.pipeline(open_base(str(folder)))
    with pytest.raises(ArtifactError, match="no text_encoder.*--base"):
        opened.pipeline(open_base(str(folder / "unet")))
