from pathlib import Path

import pytest
import safetensors.torch
import torch

from trexport.errors import BaseError
from trexport.models.base import open_base
from trexport.models.weights import Entry, RandomWeights, SafetensorsFile
from trexport.models.writer import SafetensorsWriter

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(2.5, dtype=torch.float16),
    "c.long": torch.arange(5),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
}


def test_the_writer_s_files_are_read_by_the_library(tmp_path: Path) -> None:
    entries = [
        Entry("b", "F32", (2, 3)),
        Entry("a", "F16", ()),
        Entry("c.long", "I64", (5,)),
        Entry("empty", "BF16", (0, 4)),
    ]
    with SafetensorsWriter(tmp_path / "x.safetensors", entries, {"format": "pt"}) as writer:
        for entry in entries:
            writer.write(TENSORS[entry.name])
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_the_library_s_files_are_read_in_their_order(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors", metadata={"k": "v"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"}
    assert {entry.name for entry in file.entries} == TENSORS.keys()
    with SafetensorsWriter(tmp_path / "y.safetensors", file.entries, file.metadata) as writer:
        for entry in file.entries:
            writer.write(file.tensor(entry.name))
    assert (tmp_path / "y.safetensors").read_bytes()[-64:] == (tmp_path / "x.safetensors").read_bytes()[-64:]
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:keep])
    with pytest.raises(BaseError, match="x.safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_random_weights_depend_on_name_and_seed_alone() -> None:
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "norm.weight": (8,), "norm.bias": (8,)}
    one, two = RandomWeights("x", shapes), RandomWeights("x", dict(reversed(shapes.items())))
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in shapes)
    assert not torch.equal(one.tensor("norm.weight"), RandomWeights("x", shapes, seed=1).tensor("norm.weight"))
    assert not torch.equal(one.tensor("norm.bias"), one.tensor("norm.weight") - 1)
    assert one.tensor("conv.weight").abs().max() <= 27**-0.5
    assert one.tensor("norm.weight").mean() > 0.5


def test_the_true_architectures() -> None:
    counts = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
    for name, count in counts.items():
        base = open_base(f"random:{name}")
        assert base.size_bytes == 4 * count
