"""A tiny UNet on disk, an adapter for it, and artifacts made from both once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trexport.helpers import write_unet
from trexport.artifact import Artifact, open_artifact
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trlora import save_adapter


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet folder of `random:tiny`, float32, written by the safetensors library."""
    return write_unet(tmp_path_factory.mktemp("base") / "unet", open_base("random:tiny"))


@pytest.fixture(scope="session")
def base(unet_folder: Path) -> Base:
    return open_base(str(unet_folder))


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    """A TLoRA adapter away from its start, on disk."""
    folder = tmp_path_factory.mktemp("adapter") / "tlora"
    (bound,) = open_adapters(["random:tlora:2:6"], base)
    save_adapter(bound.adapter, folder)
    return folder


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    """A LoRA adapter away from its start, on disk."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    (bound,) = open_adapters(["random:lora:3"], base)
    save_adapter(bound.adapter, folder)
    return folder


@pytest.fixture(scope="session")
def onnx_artifact(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """The merged ONNX model, float32, every axis free, strength 0.7."""
    folder = tmp_path_factory.mktemp("onnx") / "artifact"
    export_onnx(base, open_adapters([f"{adapter_folder}=0.7"], base), folder)
    return open_artifact(folder)


@pytest.fixture(scope="session")
def half_artifact(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """The merged ONNX model, float16, static."""
    folder = tmp_path_factory.mktemp("onnx") / "half"
    fixed = {"batch_size": 2, "height": 8, "width": 12, "sequence_length": 5}
    export_onnx(base, open_adapters([str(adapter_folder)], base), folder, ExportOptions("fp16", fixed=fixed))
    return open_artifact(folder)


@pytest.fixture
def config(base: Base) -> dict[str, object]:
    return json.loads(json.dumps(dict(base.config)))
