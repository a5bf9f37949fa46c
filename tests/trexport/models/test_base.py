import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.trexport.helpers import copy_of, weights_of
from trexport.errors import BaseError, UsageError
from trexport.models.base import INDEX_NAME, WEIGHTS_STEM, Base, open_base
from trexport.models.model import load_model

FILE = f"{WEIGHTS_STEM}.safetensors"


def test_a_loaded_unet_has_the_file_s_weights(base: Base) -> None:
    model = load_model(base)
    expected = weights_of(base)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    half = load_model(base, "bf16")
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("random:sd16", UsageError),
        ("sample:digit", UsageError),
        ("no/such/folder", BaseError),
        ("/no/such", BaseError),
        ("nothing", BaseError),
    ],
)
def test_an_unknown_base_is_refused(name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name.partition(":")[2][:4] or name):
        open_base(name)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(UsageError, match="sd15"):
        open_base("random:sd16")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match="some-owner/some-model"):
        open_base("some-owner/some-model")


def test_folders_without_a_unet_or_without_weights(unet_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="config.json"):
        open_base(str(tmp_path))
    folder = copy_of(unet_folder, tmp_path / "unet")
    (folder / FILE).rename(folder / f"{WEIGHTS_STEM}.fp16.safetensors")
    with pytest.raises(BaseError, match="--variant"):
        open_base(str(folder))
    assert open_base(str(folder), variant="fp16").shapes()
    (folder / f"{WEIGHTS_STEM}.fp16.safetensors").unlink()
    with pytest.raises(BaseError, match="no weights"):
        open_base(str(folder))
    torch.save({}, folder / f"{WEIGHTS_STEM}.bin")
    with pytest.raises(BaseError, match="pickle"):
        open_base(str(folder))
    torch.save({"conv_in.bias": torch.zeros(3)}, folder / FILE)
    with pytest.raises(BaseError, match="pickle"):
        open_base(str(folder))


def test_another_model_class_is_refused(unet_folder: Path, tmp_path: Path, config: dict[str, object]) -> None:
    folder = copy_of(unet_folder, tmp_path / "unet")
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(BaseError, match="AutoencoderKL"):
        open_base(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseError, match="JSON"):
        open_base(str(folder))


def test_weights_that_do_not_fit_the_config(unet_folder: Path, tmp_path: Path, config: dict[str, object]) -> None:
    folder = copy_of(unet_folder, tmp_path / "unet")
    (folder / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 20}))
    with pytest.raises(BaseError, match="to_k.weight"):
        load_model(open_base(str(folder)))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights_of(open_base(str(unet_folder)))
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, folder / FILE)
    with pytest.raises(BaseError, match=r"missing, conv_out\.bias"):
        load_model(open_base(str(folder)))
    safetensors.torch.save_file(tensors | {"conv_ou.bias": torch.zeros(1)}, folder / FILE)
    with pytest.raises(BaseError, match="'conv_out.bias'"):
        load_model(open_base(str(folder)))


def test_a_damaged_shard_index_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(unet_folder, tmp_path / "unet")
    (folder / FILE).rename(folder / "shard.safetensors")
    names = open_base(str(unet_folder)).shapes()
    good = {"weight_map": dict.fromkeys(names, "shard.safetensors")}
    (folder / INDEX_NAME).write_text(json.dumps(good))
    assert open_base(str(folder)).content_hash() == open_base(str(unet_folder)).content_hash()
    for weight_map in ({"conv_in.bias": "../x"}, {"conv_in.bias": "other.safetensors"}, None):
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BaseError, match=INDEX_NAME.replace(".", r"\.")):
            open_base(str(folder))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": good["weight_map"] | {"extra": "shard.safetensors"}}))
    with pytest.raises(BaseError, match="extra"):
        open_base(str(folder))
