"""One test for every backend: it runs the same model to the same result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.trexport.helpers import SIZES
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, OnnxFile, Source, TorchModel, backend_of, device_of
from trexport.errors import ArtifactError, MissingError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.models.model import first_output, load_model, merge_into_, random_feeds
from trexport.parity.metrics import relative_l2


def _torch_model(artifact: Artifact) -> TorchModel:
    base, adapters = artifact.sources()
    return TorchModel(base, adapters, "fp32")


# a new backend adds a line here: what it loads, from the ONNX artifact of the tests
SOURCES = {
    "torch": lambda artifact: _torch_model(artifact),
    "torch-compile": lambda artifact: _torch_model(artifact),
    "onnxruntime": lambda artifact: OnnxFile(artifact.onnx_path, artifact.manifest.io),
}


APART = {"aotinductor", "tensorrt", "tensorrt-rtx"}
"""Engines: tests of their own build them, in test_aotinductor.py and, as far as that goes without a GPU, in trt/."""


def test_every_backend_has_a_source_here() -> None:
    assert SOURCES.keys() | APART == BACKENDS.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_a_backend_agrees_with_torch(name: str, onnx_artifact: Artifact) -> None:
    backend = backend_of(name)
    available = backend.availability("cpu")
    assert available.ok
    assert available.version
    source: Source = SOURCES[name](onnx_artifact)
    assert isinstance(source, backend.consumes)
    base, adapters = onnx_artifact.sources()
    model = load_model(base)
    merge_into_(model, adapters)
    feeds = random_feeds(onnx_artifact.manifest.io, SIZES, seed=5)
    given = {key: tensor.clone() for key, tensor in feeds.items()}
    with torch.inference_mode():
        expected = first_output(model, feeds)
    with backend.load(source, "cpu") as runner:
        assert runner.device == "cpu"
        first = runner(feeds)["out_sample"]
        assert relative_l2(first, expected) <= 1e-5
        other = runner({**feeds, "timestep": torch.tensor(3.0)})["out_sample"]
        assert not torch.equal(first, other)
        assert relative_l2(first, expected) <= 1e-5  # a result is not overwritten by the next call
        step = runner.step(feeds)
        step.run()
        assert relative_l2(step.outputs["out_sample"], expected) <= 1e-5
        step.outputs["out_sample"].zero_()
        step.run()
        assert relative_l2(step.outputs["out_sample"], expected) <= 1e-5
    assert all(torch.equal(feeds[key], tensor) for key, tensor in given.items())


def test_factored_adapters_in_torch(onnx_artifact: Artifact) -> None:
    base, adapters = onnx_artifact.sources()
    feeds = random_feeds(onnx_artifact.manifest.io, SIZES)
    outputs = []
    for factored in (False, True):
        with BACKENDS["torch"].load(TorchModel(base, adapters, "fp32", factored), "cpu") as runner:
            outputs.append(runner(feeds)["out_sample"])
    assert 0 < relative_l2(outputs[1], outputs[0]) <= 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_device_is_said(name: str, onnx_artifact: Artifact) -> None:
    assert not BACKENDS[name].availability("cuda").ok
    with pytest.raises(MissingError, match=r"CUDA|cuda"):
        BACKENDS[name].load(SOURCES[name](onnx_artifact), "cuda")


def test_a_missing_package_is_said(onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not BACKENDS["onnxruntime"].availability("cpu").ok
    with pytest.raises(MissingError, match=r"trexport\[onnxruntime\]"):
        BACKENDS["onnxruntime"].load(SOURCES["onnxruntime"](onnx_artifact), "cpu")


def test_a_file_that_is_no_model(onnx_artifact: Artifact, tmp_path: object) -> None:
    source = OnnxFile(onnx_artifact.folder / "trexport.json", onnx_artifact.manifest.io)
    with pytest.raises(ArtifactError, match="onnxruntime"):
        BACKENDS["onnxruntime"].load(source, "cpu")


def test_names() -> None:
    with pytest.raises(UsageError, match="'onnxruntime'"):
        backend_of("onnxruntim")
    assert device_of("auto") in ("cpu", "cuda")
    with pytest.raises(UsageError, match="tpu"):
        device_of("tpu")


def test_a_precision_without_kernels_is_said(onnx_artifact: Artifact, tmp_path: Path) -> None:
    base, adapters = onnx_artifact.sources()
    export_onnx(base, adapters, tmp_path / "x", ExportOptions("bf16", fixed=SIZES))
    artifact = open_artifact(tmp_path / "x")
    with pytest.raises(MissingError, match="no kernel"):
        BACKENDS["onnxruntime"].load(SOURCES["onnxruntime"](artifact), "cpu")
