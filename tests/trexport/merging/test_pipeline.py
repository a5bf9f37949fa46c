"""Adapters on text encoders, against what diffusers makes of the same files: `load_lora_weights` and `fuse_lora`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import copy_of, leftovers, run_cli
from tests.trexport.pipelines import edit_json, opened, run_session
from trexport.artifact import open_artifact
from trexport.errors import AdapterWarning, ArtifactError
from trexport.formats import read_adapter
from trexport.graph.components import export_components
from trexport.manifest import ComponentRecord
from trexport.models.adapters import on_component, open_adapters
from trexport.models.base import Base, open_base
from trexport.models.component import load_component
from trlora import CheckpointError

Tensors = dict[str, Tensor]
CLASSES: dict[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
ENCODERS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
]
TEXT = [
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.0.self_attn.out_proj",
    "text_model.encoder.layers.1.self_attn.k_proj",
    "text_model.encoder.layers.1.self_attn.v_proj",
    "text_model.encoder.layers.1.mlp.fc1",
    "text_model.encoder.layers.1.mlp.fc2",
]
FIXED = {"sequence_length": 5}
KOHYA = {"sd": {"text_encoder": "lora_te_"}, "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}


def load(folder: Path, name: str) -> Any:
    return CLASSES[name].from_pretrained(folder)


def pairs(pipe: Any, name: str) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(component, path) → A and B, of rank 2, in the order of one seed."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for component in ["unet", *ENCODERS[name]]:
        modules = dict(getattr(pipe, component).named_modules())
        for path in UNET if component == "unet" else TEXT:
            layer = modules.get(path) or modules[path.removeprefix("text_model.")]
            rows, columns = layer.weight.shape
            a = torch.randn(2, columns, generator=generator)
            found[component, path] = a, 0.1 * torch.randn(rows, 2, generator=generator)
    return found


def new(pipe: Any, name: str) -> tuple[Tensors, dict[str, str]]:
    """PEFT's names below diffusers' prefixes."""
    found: Tensors = {}
    for (component, path), (a, b) in pairs(pipe, name).items():
        found |= {f"{component}.{path}.lora_A.weight": a, f"{component}.{path}.lora_B.weight": b}
    return found, {}


def with_configs(pipe: Any, name: str) -> tuple[Tensors, dict[str, str]]:
    """With a config for each model, whose alphas differ."""
    fields: dict[str, Any] = {}
    for number, component in enumerate(["unet", *ENCODERS[name]]):
        known = dict(getattr(pipe, component).named_modules())  # which transformers 5 calls otherwise than files do
        paths = UNET if component == "unet" else TEXT
        targets = [path if path in known else path.removeprefix("text_model.") for path in paths]
        own = {"r": 2, "lora_alpha": 3 + number, "alpha_pattern": {}, "rank_pattern": {}, "target_modules": targets}
        fields |= {f"{component}.{key}": value for key, value in own.items()}
    return new(pipe, name)[0], {"lora_adapter_metadata": json.dumps(fields), "format": "pt"}


def old(pipe: Any, name: str) -> tuple[Tensors, dict[str, str]]:
    """`lora_linear_layer` in text encoders, `lora` in the UNet."""
    found: Tensors = {}
    for (component, path), (a, b) in pairs(pipe, name).items():
        middle = "lora" if component == "unet" else "lora_linear_layer"
        found |= {f"{component}.{path}.{middle}.down.weight": a, f"{component}.{path}.{middle}.up.weight": b}
    return found, {}


def older(pipe: Any, name: str) -> tuple[Tensors, dict[str, str]]:
    """Projections of text encoders called as the UNet's; there were none for the feed-forward layers."""
    names = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
    found: Tensors = {}
    for (component, path), (a, b) in pairs(pipe, name).items():
        parent, _, leaf = path.rpartition(".")
        if component != "unet" and leaf in names:
            key = f"{component}.{parent}.{names[leaf]}"
            found |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    return found, {}


def kohya(pipe: Any, name: str) -> tuple[Tensors, dict[str, str]]:
    found: Tensors = {}
    for (component, path), (a, b) in pairs(pipe, name).items():
        key = (KOHYA[name] | {"unet": "lora_unet_"})[component] + path.replace(".", "_")
        alpha = torch.tensor(1.0 if component == "unet" else 3.0)
        found |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": alpha}
    return found, {"ss_network_dim": "2"}


def written(make: Callable[..., tuple[Tensors, dict[str, str]]], pipe: Any, name: str, file: Path) -> Path:
    tensors, metadata = make(pipe, name)
    safetensors.torch.save_file(tensors, file, metadata=metadata or None)
    return file


def states(pipe: Any, name: str) -> dict[str, Tensor]:
    parts = ["unet", *ENCODERS[name]]
    return {f"{part}.{key}": t.clone() for part in parts for key, t in getattr(pipe, part).state_dict().items()}


@pytest.mark.parametrize(("name", "make"), [
    ("sd", new), ("sd", with_configs), ("sd", old), ("sd", older), ("sd", kohya),
    ("sdxl", new), ("sdxl", with_configs), ("sdxl", kohya),
])  # fmt: skip
def test_the_merged_pipeline_is_that_of_diffusers(
    name: str, make: Any, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, theirs = pipelines / name, load(pipelines / name, name)
    before = states(theirs, name)
    file = written(make, theirs, name, tmp_path / "a.safetensors")
    theirs.load_lora_weights(str(file))
    parts = [part for part in ("unet", *ENCODERS[name]) if part != "unet" or make is not older]
    theirs.fuse_lora(lora_scale=0.7, components=parts)
    theirs.unload_lora_weights()
    expected = states(theirs, name)
    assert run_cli(["merge", base, f"{file}=0.7", "-o", tmp_path / "out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = states(load(tmp_path / "out", name), name)
    changed = {key for key, tensor in found.items() if bits(tensor) != bits(before[key])}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    count = 4 if make is older else len(TEXT)
    assert {part: len(layers) for part, layers in told["text_encoders"].items()} == dict.fromkeys(ENCODERS[name], count)
    assert len(changed) == count * len(ENCODERS[name]) + (0 if make is older else len(UNET))
    assert {
        key for key, tensor in expected.items() if not torch.allclose(tensor, before[key], rtol=0, atol=1e-5)
    } == changed


@pytest.fixture
def sd_file(pipelines: Path, tmp_path: Path) -> Path:
    return written(kohya, load(pipelines / "sd", "sd"), "sd", tmp_path / "a.safetensors")


def test_what_is_on_disk_and_what_is_said(
    pipelines: Path, sd_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(pipelines / "sd", tmp_path / "sd")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(base / "model_index.json", safety_checker=checker)
    assert run_cli(["merge", base, sd_file, "-o", tmp_path / "dry", "--dry-run"]) == 0
    assert "adapted: 2 of unet, 6 of text_encoder" in capsys.readouterr().out
    assert run_cli(["merge", base, sd_file, "-o", tmp_path / "out", "--dtype", "fp16"]) == 0
    said = capsys.readouterr().out
    assert "6 layers of text_encoder merged" in said
    assert "StableDiffusionSafetyChecker, left out" in said
    assert leftovers(tmp_path / "out") == sorted([*leftovers(pipelines / "sd"), "trexport.json"])
    manifest = open_artifact(tmp_path / "out").manifest
    assert manifest.adapters[0].components == {"text_encoder": 6}
    record = manifest.text_encoders["text_encoder"]
    assert (record.class_name, record.adapters[0].layers) == ("CLIPTextModel", 6)
    half = safetensors.torch.load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert {t.dtype for t in half.values() if t.is_floating_point()} == {torch.float16}
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / vae).read_bytes() == (base / vae).read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert pipe.text_encoder.dtype == torch.float16
    # strength zero is the base, bit for bit, in every file
    assert run_cli(["merge", base, f"{sd_file}=0", "-o", tmp_path / "off"]) == 0
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", vae):
        ours, theirs = (safetensors.torch.load_file(folder / part) for folder in (tmp_path / "off", base))
        assert {key: bits(tensor) for key, tensor in ours.items()} == {key: bits(t) for key, t in theirs.items()}
    # and a text encoder that has changed since is told
    weights = tmp_path / "off" / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(ArtifactError, match="text_encoder: the weights changed"):
        open_artifact(tmp_path / "off")


@pytest.mark.parametrize(("name", "component"), [("sd", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_an_exported_text_encoder_has_the_adapter(name: str, component: str, pipelines: Path, tmp_path: Path) -> None:
    pipe = load(pipelines / name, name)
    file = written(kohya, pipe, name, tmp_path / "a.safetensors")
    pipeline = opened(pipelines / name, component)
    bound = open_adapters([f"{file}=0.7"], open_base(str(pipelines / name)), lambda: text_encoders(pipelines / name))
    (tmp_path / "out").mkdir()
    record = export_components(pipeline, tmp_path / "out", "fp32", fixed=FIXED, adapters=bound)[component]
    assert record.adapters[0].layers == len(TEXT)
    assert ComponentRecord.from_dict(record.to_dict()) == record
    ids = torch.randint(0, 500, (2, 5), generator=torch.Generator().manual_seed(1))
    encoder = getattr(pipe, component)
    with torch.no_grad():
        plain = encoder(ids).last_hidden_state
        pipe.load_lora_weights(str(file))
        pipe.fuse_lora(lora_scale=0.7, components=[component])
        expected = encoder(ids).last_hidden_state
        # the reference that `validate` compares with keeps the adapter beside the weights
        reference = load_component(pipeline.components[component], on_component(bound, component), merged=False).module
        outputs = dict(zip((tensor.name for tensor in record.io.outputs), reference(ids), strict=True))
    assert (expected - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(outputs["last_hidden_state"], expected, rtol=1e-4, atol=1e-4)
    found = run_session(tmp_path / "out" / component / "model.onnx", ids)["last_hidden_state"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def text_encoders(folder: Path) -> dict[str, Base]:
    return opened(folder).text_encoders


def test_a_normalisation_of_a_text_encoder_changes(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LyCORIS' `norm`: in the file, and in the reference beside which other adapters stay apart."""
    name = "lora_te_text_model_encoder_layers_0_layer_norm1"
    change = {f"{name}.w_norm": torch.linspace(-1, 1, 32), f"{name}.b_norm": torch.linspace(0, 1, 32)}
    safetensors.torch.save_file(change, tmp_path / "a.safetensors")
    argument = f"{tmp_path / 'a.safetensors'}=0.5"
    assert run_cli(["merge", pipelines / "sd", argument, "-o", tmp_path / "json", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapted"]["text_encoder"] == 2
    assert run_cli(["merge", pipelines / "sd", argument, "-o", tmp_path / "json", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["offsets"]
    assert [name.rpartition("layers.")[2] for name in names] == ["0.layer_norm1.weight", "0.layer_norm1.bias"]
    assert all(name.startswith("text_encoder/") for name in names)
    assert open_artifact(tmp_path / "json").manifest.adapters[0].components == {"text_encoder": 2}
    assert run_cli(["inspect", tmp_path / "a.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["components"] == {"text_encoder": 2}
    assert told["carried"]["factored"].startswith("no: all of it is for text encoders")
    assert "with a whole pipeline" in told["carried"]["merged"]
    assert run_cli(["merge", pipelines / "sd", argument, "-o", tmp_path / "out"]) == 0
    said = capsys.readouterr().out
    assert "2 biases and weights of normalisations changed, text_encoder/" in said
    assert "0 layers" not in said
    plain, found = load(pipelines / "sd", "sd").text_encoder, load(tmp_path / "out", "sd").text_encoder
    expected = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    for leaf, key in (("weight", "w_norm"), ("bias", "b_norm")):
        (own,) = [key for key in expected if key.endswith(f"layers.0.layer_norm1.{leaf}")]
        expected[own] += 0.5 * change[f"{name}.{key}"]
    for key, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[key])
    pipeline = opened(pipelines / "sd", "text_encoder")
    bound = open_adapters([argument], open_base(str(pipelines / "sd")), lambda: text_encoders(pipelines / "sd"))
    on_it = on_component(bound, "text_encoder")
    reference = load_component(pipeline.components["text_encoder"], on_it, merged=False).module
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(reference(ids)[0], found(ids).last_hidden_state)


def only_text(sd_file: Path) -> Path:
    tensors = safetensors.torch.load_file(sd_file)
    file = sd_file.with_name("text.safetensors")
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if "lora_te_" in key}, file)
    return file


def test_what_is_left_out_is_said(
    pipelines: Path, sd_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, alone = pipelines / "sd", pipelines / "sd" / "unet"
    with pytest.warns(AdapterWarning, match="6 layers of text_encoder are left out: only the UNet"):
        (bound,) = open_adapters([str(sd_file)], open_base(str(alone)))
    assert bound.components == {}
    for arguments in (["merge", alone, sd_file], ["merge", base, sd_file, "--unet-only"]):
        out = tmp_path / f"out{len(arguments)}"
        assert run_cli([*arguments, "-o", out]) == 0
        assert "warning: " in capsys.readouterr().err
        assert (out / "config.json").is_file()
    assert run_cli(["onnx", base, sd_file, "-o", tmp_path / "x", "--factored", "--dry-run"]) == 0
    assert "layers of text_encoder are left out" in capsys.readouterr().err
    text = only_text(sd_file)
    with pytest.raises(CheckpointError, match="nothing for the UNet or transformer inside, .* whole pipeline"):
        open_adapters([str(text)], open_base(str(alone)))
    assert run_cli(["merge", base, text, "-o", tmp_path / "text"]) == 0
    capsys.readouterr()
    assert run_cli(["inspect", sd_file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"] == {"text_encoder": 6}


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", (32, 32), "pipeline has text_encoder; with"),
        ("text_encoder.text_model.encoder.layers.9.self_attn.q_proj", (32, 32), "layers.9.* no such linear layer"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", (48, 32), "base's layer has 32 → 32"),
    ],
)
def test_what_fits_no_text_encoder_is_refused(
    key: str, shape: tuple[int, int], says: str, pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, columns = shape
    tensors = {f"{key}.lora_A.weight": torch.ones(2, columns), f"{key}.lora_B.weight": torch.ones(rows, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    assert run_cli(["merge", pipelines / "sd", tmp_path / "a.safetensors", "-o", tmp_path / "out"]) == 1
    assert re.search(says, capsys.readouterr().err)
    assert leftovers(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(("name", "to"), [("sd", "trlora"), ("sd", "kohya"), ("sdxl", "diffusers"), ("sdxl", "kohya")])
def test_conversions_carry_what_is_for_text_encoders(name: str, to: str, pipelines: Path, tmp_path: Path) -> None:
    pipe = load(pipelines / name, name)
    before = states(pipe, name)
    file = written(kohya if to != "kohya" else new, pipe, name, tmp_path / "a.safetensors")
    out = tmp_path / ("b.safetensors" if to != "trlora" else "b")
    assert run_cli(["convert", f"{file}=0.7", "-o", out, "--to", to]) == 0
    for folder, given in (("one", f"{file}=0.7"), ("other", str(out))):
        assert run_cli(["merge", pipelines / name, given, "-o", tmp_path / folder]) == 0
    one, other = (states(load(tmp_path / folder, name), name) for folder in ("one", "other"))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)
    assert sum(bits(tensor) != bits(before[key]) for key, tensor in other.items()) == 2 + 6 * len(ENCODERS[name])
    if to != "trlora":  # and diffusers reads it as it reads the source
        pipe.load_lora_weights(str(out))
        pipe.fuse_lora(components=["unet", *ENCODERS[name]])
        pipe.unload_lora_weights()
        for key, tensor in states(pipe, name).items():
            torch.testing.assert_close(tensor, one[key], rtol=1e-5, atol=1e-6)


def test_what_a_conversion_leaves_out(sd_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["convert", sd_file, "-o", tmp_path / "peft", "--to", "peft"]) == 0
    assert "warning: adapters of 6 layers of text_encoder are left out" in capsys.readouterr().err
    assert run_cli(["convert", only_text(sd_file), "-o", tmp_path / "none", "--to", "peft"]) == 2
    assert "nothing for the UNet or transformer inside" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("missing", ["config", "tensors"])
def test_half_a_checkpoint_of_a_pipeline_is_refused(missing: str, sd_file: Path, tmp_path: Path) -> None:
    assert run_cli(["convert", sd_file, "-o", tmp_path / "x"]) == 0
    if missing == "config":
        config = tmp_path / "x" / "adapter_config.json"
        fields = json.loads(config.read_text())
        del fields["components"]
        config.write_text(json.dumps(fields))
    else:
        weights = tmp_path / "x" / "adapter_model.safetensors"
        tensors = {key: t for key, t in safetensors.torch.load_file(weights).items() if "/" not in key}
        safetensors.torch.save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="text_encoder/: this model of the pipeline is missing in the"):
        read_adapter(tmp_path / "x")
