"""A tiny UNet on disk, an adapter for it, and artifacts made from both once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.trexport.helpers import SIZES, write_model, write_overflowing
from trexport.artifact import Artifact, open_artifact
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trlora import save_adapter


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet folder of `random:tiny`, float32, written by the safetensors library."""
    return write_model(tmp_path_factory.mktemp("base") / "unet", open_base("random:tiny"))


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pipelines `sd`, `sdxl` and `sd3`."""
    from tests.trexport.scripts.make_pipelines import main

    folder = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        main(folder)
    return folder


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


SHAPES = ("random:tlora:2:6", "random:lora:3")


@pytest.fixture(scope="session")
def swappable(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Artifact:
    """Swappable, for TLoRA(2,6) and LoRA 3 and what is smaller, blank, of fixed `SIZES`."""
    folder = tmp_path_factory.mktemp("onnx") / "swappable"
    options = ExportOptions(swappable=SwappableOptions(blank=True), fixed=SIZES)
    export_onnx(base, open_adapters(SHAPES, base), folder, options)
    return open_artifact(folder)


@pytest.fixture(scope="session")
def two_slots(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Artifact:
    """Factored, a slot for TLoRA(2,6) and one for LoRA 3, blank, of fixed `SIZES`."""
    folder = tmp_path_factory.mktemp("onnx") / "two_slots"
    options = ExportOptions(factored=FactoredOptions(blank=True), fixed=SIZES)
    export_onnx(base, open_adapters(SHAPES, base), folder, options)
    return open_artifact(folder)


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Artifact:
    """A bank of two places for TLoRA(2,6), blank, the batch free."""
    folder = tmp_path_factory.mktemp("onnx") / "bank"
    fixed = {axis: size for axis, size in SIZES.items() if axis != "batch_size"}
    options = ExportOptions(factored=FactoredOptions(blank=True, bank=2), fixed=fixed)
    export_onnx(base, open_adapters(SHAPES[:1], base), folder, options)
    return open_artifact(folder)


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Path:
    """An adapter of finite tensors whose products are not."""
    return write_overflowing(base, tmp_path_factory.mktemp("adapter") / "overflowing")


@pytest.fixture
def config(base: Base) -> dict[str, object]:
    return json.loads(json.dumps(dict(base.config)))
