"""Adapter files of swappable artifacts and of banks; those of factored ones are in graph/test_factored.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import SIZES, run_onnx
from trexport.adapter_file import adapter_tensors, read_adapters, write_adapters
from trexport.artifact import Artifact
from trexport.errors import ArtifactError, UsageError
from trexport.io_spec import ADAPTER_INDEX
from trexport.models.model import random_feeds

SECOND = "random:tlora:1:4"


def feeds_of(artifact: Artifact, batch: int = SIZES["batch_size"]) -> dict[str, Tensor]:
    return random_feeds(artifact.manifest.io, SIZES | {"batch_size": batch}, seed=4)


@pytest.mark.parametrize(
    ("form", "suffix"), [("swappable", ".safetensors"), ("bank", ".safetensors"), ("bank", ".onnx_adapter")]
)
def test_adapter_files_come_back_as_they_were(
    form: str, suffix: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    artifact: Artifact = request.getfixturevalue(form)
    for number, given in enumerate((["random:tlora:2:6=0.7"], ["random:tlora:2:6=0.7", f"{SECOND}=-0.4"])):
        file = tmp_path / f"{number}{suffix}"
        written, expected = write_adapters(artifact, given, file), adapter_tensors(artifact, given)
        read = read_adapters(artifact, file)
        assert read.keys() == written.keys() == expected.keys()
        assert all(bits(read[name]) == bits(expected[name]) for name in expected)
        count = len(given) if form == "swappable" else 3  # two places, and the one for no adapter
        assert {tensor.shape[0] for tensor in read.values()} == {count}
        assert form == "bank" or read["strength"].tolist() == pytest.approx([0.7, -0.4][: len(given)])


def test_adapter_files_are_taken_by_onnx_runtime(bank: Artifact, tmp_path: Path) -> None:
    given = [f"{SECOND}=0.7"]
    write_adapters(bank, given, tmp_path / "bank.onnx_adapter")
    feeds = feeds_of(bank) | {ADAPTER_INDEX: torch.tensor([1, 0])}
    by_file = run_onnx(bank.onnx_path, feeds, adapter=tmp_path / "bank.onnx_adapter")["out_sample"]
    by_hand = run_onnx(bank.onnx_path, feeds | adapter_tensors(bank, given))["out_sample"]
    assert bits(by_file) == bits(by_hand)
    assert bits(by_file[0]) != bits(run_onnx(bank.onnx_path, feeds)["out_sample"][0])


@pytest.mark.parametrize("suffix", [".onnx_adapter", ".safetensors"])
def test_a_file_for_another_artifact_is_refused(
    suffix: str, swappable: Artifact, bank: Artifact, two_slots: Artifact, tmp_path: Path
) -> None:
    artifacts = [swappable, bank, two_slots] if suffix == ".safetensors" else [bank, two_slots]
    for number, artifact in enumerate(artifacts):
        file = tmp_path / f"{number}{suffix}"
        write_adapters(artifact, ["random:tlora:2:6"], file)
        for other in artifacts:
            if other is not artifact:
                with pytest.raises(ArtifactError, match="another artifact"):
                    read_adapters(other, file)


def test_what_does_not_fit_is_not_written(swappable: Artifact, bank: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 adapters given"):
        write_adapters(bank, ["random:tlora:2:6", SECOND, "random:tlora:1:1"], tmp_path / "x.safetensors")
    for artifact, argument in ((bank, "random:lora:3"), (swappable, "random:tlora:3:6")):
        with pytest.raises(ArtifactError, match="export for this adapter's shapes"):
            write_adapters(artifact, [argument], tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="merge.onnx"):
        write_adapters(swappable, ["random:tlora:2:6"], tmp_path / "x.onnx_adapter")
    assert list(tmp_path.iterdir()) == []
