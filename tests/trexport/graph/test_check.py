from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from tests.trexport.helpers import copy_of
from trexport.artifact import Artifact
from trexport.errors import ArtifactError, ExportError
from trexport.graph.check import check_model, load_graph, spec_of_graph


def test_the_spec_is_read_back(onnx_artifact: Artifact) -> None:
    io = onnx_artifact.manifest.io
    assert replace(spec_of_graph(load_graph(onnx_artifact.onnx_path)), model=io.model) == io


def test_what_is_missing_is_named(onnx_artifact: Artifact, half_artifact: Artifact, tmp_path: Path) -> None:
    path, io = onnx_artifact.onnx_path, onnx_artifact.manifest.io
    check_model(path, io, ["conv_in.weight"])
    with pytest.raises(ExportError, match="conv_in.wait"):
        check_model(path, io, ["conv_in.wait"])
    with pytest.raises(ExportError, match="input"):
        check_model(path, half_artifact.manifest.io, [])
    folder = copy_of(onnx_artifact.folder / "unet", tmp_path / "unet")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ExportError, match="NoSuchOperator"):
        check_model(folder / "model.onnx", io, [])


@pytest.mark.parametrize("content", [b"", b"\x08\xff\xff", b"not a model at all"])
def test_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.onnx"):
        load_graph(tmp_path / "x.onnx")
