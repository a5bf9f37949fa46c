"""What is in a pipeline's folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trexport.helpers import copy_of
from tests.trexport.pipelines import VAE_WEIGHTS, edit_json, edit_weights, fake_hub, opened
from trexport.errors import BaseError, MissingError
from trexport.models import pipeline as module
from trexport.models.base import Base, open_base
from trexport.models.component import component_spec, load_component
from trexport.models.pipeline import open_pipeline


def test_a_unet_alone_is_no_pipeline(base: Base) -> None:
    assert open_pipeline(base) is None
    assert open_pipeline(open_base("random:tiny")) is None
    assert open_pipeline(open_base("sample:digits")) is None


def test_parts_and_parameters(pipelines: Path) -> None:
    sdxl = opened(pipelines / "sdxl")
    assert list(sdxl.components) == ["text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"]
    assert sdxl.left_out == {}
    for component in sdxl.components.values():
        held = load_component(component).parameters
        assert component.parameters == sum(value.numel() for value in held.values())
        assert held.keys() <= component.source.shapes().keys()  # PyTorch's own names
        for name, value in held.items():
            assert torch.equal(value, component.source.weights[0].tensor(name)), name


def test_stable_diffusion_3(pipelines: Path) -> None:
    """Its transformer reads CLIP's tokens and T5's; its CLIPs have their own only, wherever the transformer's are fixed."""
    sd3 = opened(pipelines / "sd3")
    assert list(sd3.components) == ["text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"]
    assert sd3.left_out == {}
    for tokens, expected in ((333, 77), (20, 20)):
        fixed = {"sequence_length": tokens, "height": 16, "width": 16}
        spec = component_spec(sd3.components["text_encoder_2"], "fp32", fixed)
        assert [tensor.axes for tensor in spec.inputs] == [("batch_size", expected)]
        assert [tensor.name for tensor in spec.outputs][:3] == ["text_embeds", "last_hidden_state", "hidden_states.0"]


def test_what_is_not_exported_is_named(pipelines: Path, tmp_path: Path) -> None:
    folder = copy_of(pipelines / "sd", tmp_path / "sd")
    odd = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    odd |= {"vae": ["diffusers", "AutoencoderTiny"], "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    edit_json(folder / "model_index.json", **odd)
    pipeline = opened(folder)
    assert pipeline.left_out == {
        "safety_checker": "StableDiffusionSafetyChecker",
        "vae": "AutoencoderTiny",
        "image_encoder": "CLIPVisionModelWithProjection",
    }
    assert list(pipeline.components) == ["text_encoder"]
    assert pipeline.index["vae"] == pipeline.index["safety_checker"] == [None, None]
    assert pipeline.index["requires_safety_checker"] is False


def no_weights(folder: Path) -> None:
    (folder / VAE_WEIGHTS).unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({}, folder / "text_encoder" / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def other_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")


WRONG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no weights": (no_weights, ["vae", "no weights"]),
    "only a pickle": (only_a_pickle, ["text_encoder", "pytorch_model.bin", "pickles"]),
    "truncated": (truncated, ["model.safetensors", "truncated"]),
    "only a variant": (other_weights, ["model.fp16.safetensors", "--variant"]),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), ["vae", "config.json", "--unet-only"]),
    "config no JSON": (lambda f: (f / "vae" / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "index no object": (lambda f: (f / "model_index.json").write_text("[1]"), ["model_index.json", "list"]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), ["tokenizer", "model_index.json"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_whole_is_refused(case: str, pipelines: Path, tmp_path: Path) -> None:
    damage, words = WRONG[case]
    folder = copy_of(pipelines / "sd", tmp_path / "sd")
    damage(folder)
    with pytest.raises(BaseError) as caught:
        open_pipeline(open_base(str(folder)))
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize("damage", ["missing", "unknown", "of a wrong shape"])
def test_weights_that_do_not_fit_the_config_are_refused(
    name: str, damage: str, pipelines: Path, tmp_path: Path
) -> None:
    folder = copy_of(pipelines / "sd", tmp_path / "sd")
    file = folder / (VAE_WEIGHTS if name == "vae_decoder" else "text_encoder/model.safetensors")
    key = next(key for key in opened(folder).components[name].source.shapes() if key.endswith("norm2.bias"))
    change = {
        "missing": lambda tensors: tensors.pop(key),
        "unknown": lambda tensors: tensors.update({f"{key}x": torch.zeros(1)}),
        "of a wrong shape": lambda tensors: tensors.update({key: torch.zeros(3)}),
    }[damage]
    edit_weights(file, change)
    with pytest.raises(BaseError, match=key.replace(".", r"\.") if damage != "of a wrong shape" else name[:3]):
        load_component(opened(folder).components[name])


def test_without_transformers_it_says_what_to_install(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"trexport\[pipelines\].*--unet-only"):
        open_pipeline(open_base(str(pipelines / "sd")))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_id_is_fetched_at_one_commit(
    variant: str | None, pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, cache = copy_of(pipelines / "sd", tmp_path / "hub"), tmp_path / "cache"
    for part in ("unet", "vae"):
        plain = hub / part / "diffusion_pytorch_model.safetensors"
        shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (hub / "text_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    asked = fake_hub(hub, cache, monkeypatch)
    base = open_base("owner/name", revision="main", variant=variant)
    assert not (cache / "0123abcd" / "vae").exists()
    pipeline = open_pipeline(base)
    assert pipeline is not None
    assert list(pipeline.components) == ["text_encoder", "vae_encoder", "vae_decoder"]
    assert pipeline.components["vae_decoder"].source.variant == variant
    assert pipeline.components["text_encoder"].source.variant is None  # which has none
    fetched = {path.name for path in cache.rglob("*.*") if path.is_file()}
    wanted = "diffusion_pytorch_model.fp16.safetensors" if variant else "diffusion_pytorch_model.safetensors"
    other = "diffusion_pytorch_model.safetensors" if variant else "diffusion_pytorch_model.fp16.safetensors"
    assert wanted in fetched
    assert not fetched & {other, "pytorch_model.bin"}
    assert asked[0] == "main"
    assert set(asked[1:]) == {"0123abcd"}
    assert json.loads((cache / "0123abcd" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
