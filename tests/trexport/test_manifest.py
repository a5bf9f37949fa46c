import json
from pathlib import Path

import pytest

from tests.trexport.helpers import copy_of
from trexport.artifact import Artifact, open_artifact
from trexport.errors import ArtifactError
from trexport.manifest import MANIFEST_NAME, Manifest


def test_round_trip(onnx_artifact: Artifact, tmp_path: Path) -> None:
    onnx_artifact.manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == onnx_artifact.manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest_version": 1}', '{"manifest_version": "x"}', "\x00"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=MANIFEST_NAME):
        Manifest.read(tmp_path)


def test_a_newer_manifest_is_refused_by_its_version(onnx_artifact: Artifact, tmp_path: Path) -> None:
    fields = onnx_artifact.manifest.to_dict() | {"manifest_version": 2}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="manifest_version 2"):
        Manifest.read(tmp_path)


def test_an_artifact_with_a_changed_or_missing_file_is_refused(onnx_artifact: Artifact, tmp_path: Path) -> None:
    changed = copy_of(onnx_artifact.folder, tmp_path / "changed")
    data = changed / "unet" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(ArtifactError, match="model.onnx_data"):
        open_artifact(changed)
    data.unlink()
    with pytest.raises(ArtifactError, match="model.onnx_data"):
        open_artifact(changed)


def test_sources_that_changed_since_are_refused(
    onnx_artifact: Artifact, unet_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="hash"):
        onnx_artifact.sources(base="random:tiny-sdxl", adapters=[])
    with pytest.raises(ArtifactError, match="hash"):
        onnx_artifact.sources(adapters=[str(lora_folder)])
    with pytest.raises(ArtifactError, match="--base"):
        onnx_artifact.sources(base=str(tmp_path / "gone"))
    moved = copy_of(unet_folder, tmp_path / "moved")
    base, adapters = onnx_artifact.sources(base=str(moved))
    assert base.name == str(moved)
    assert [adapter.strength for adapter in adapters] == [0.7]
