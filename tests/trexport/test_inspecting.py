from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.trexport.helpers import copy_of
from trexport.artifact import Artifact
from trexport.errors import TrexportError
from trexport.inspecting import inspect
from trlora import CheckpointError, load_adapter, save_adapter


def test_an_adapter_in_either_form_and_under_any_name(adapter_folder: Path, tmp_path: Path) -> None:
    found = inspect(str(adapter_folder))
    assert (found.kind, found.facts["method"], found.facts["layers"]) == ("adapter", "TLoRA(2,6)", 32)
    assert found.facts["parameters"] == sum(row[2] for row in found.rows)
    save_adapter(load_adapter(adapter_folder), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "x.onnx")
    single = inspect(str(tmp_path / "x.onnx"))
    assert single.kind == "adapter"
    assert single.facts["parameters"] == found.facts["parameters"]


def test_unets(unet_folder: Path) -> None:
    found = inspect(str(unet_folder))
    assert found.kind == "UNet"
    assert found.facts["parameters"] * 4 == found.facts["size_bytes"]
    assert inspect("random:tiny").facts["content_hash"] == found.facts["content_hash"]
    assert inspect("sample:digits").kind == "UNet"
    assert inspect("sample:digits/nine").facts["method"].startswith("TLoRA")


def test_onnx_models_and_artifacts(onnx_artifact: Artifact, tmp_path: Path) -> None:
    assert inspect(str(onnx_artifact.folder)).facts["verified"] is True
    model = inspect(str(onnx_artifact.onnx_path))
    assert model.kind == "onnx"
    assert model.facts["opsets"] == {"ai.onnx": 23}
    assert dict((row[0], row[1]) for row in model.rows)["Attention"] == 8
    copied = copy_of(onnx_artifact.folder / "unet", tmp_path / "unet")
    assert inspect(str(copied)).kind == "onnx"


def test_other_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2, 3)}, tmp_path / "x")
    found = inspect(str(tmp_path / "x"))
    assert found.kind.startswith("safetensors")
    assert found.rows == [("a", "F32", "2×3")]


def test_what_is_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(TrexportError, match="neither"):
        inspect(str(tmp_path / "x"))
    torch.save({}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        inspect(str(tmp_path / "y.safetensors"))
    with pytest.raises(TrexportError, match="no such"):
        inspect(str(tmp_path / "z"))
