"""Adapter files of ONNX Runtime back to checkpoints: every member, whole files, files that are none of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.helpers import (
    IN,
    MAGNITUDES,
    OUT,
    OUTPUT_TRANSFORMS,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    trained,
    weight_oracle,
)
from tests.trexport.graph.ops.helpers import RING, slot_of, three_adapters
from tests.trexport.helpers import run_cli, weights_of
from trexport.adapter_file import write_adapters
from trexport.artifact import Artifact
from trexport.backends.onnxruntime import write_adapter_file
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import LayerSlot, Slot
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.restoring import restored_adapter
from trlora import LayerAdapter, adapted_weight, load_adapter

FILE = "a.onnx_adapter"
SERIES = [member for member in TRANSFORMS if "neumann_terms" in member.fields]
EACH = [
    *((member, None, None, None) for member in TRANSFORMS if member.type != "identity" and member not in SERIES),
    *((None, member, None, None) for member in RESIDUALS if member.type != "none"),
    *((None, RESIDUALS[1], member, None) for member in MAGNITUDES if member.type != "none"),
    *((None, None, None, member) for member in OUTPUT_TRANSFORMS),
]  # fmt: skip
"""Transform, residual, magnitude and output transform: each member once."""


def weight_of() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9))


def made(parts: tuple[Member | None, ...], seed: int = 3) -> LayerAdapter:
    transform, residual, magnitude, turn = parts
    return trained(adapter_of(transform, residual, 0, magnitude, weight_of(), turn), seed)


def restored(adapter: LayerAdapter, file: Path, slot: LayerSlot | None = None) -> Tensor:
    """The weight with what comes back of an adapter."""
    named = Slot("", {"a": slot or LayerSlot.of(adapter)})
    write_adapter_file(file, named.tensors({"a": adapter}, 0.7, "x"), 1)
    found = restored_adapter(file)
    assert found.config.strength == pytest.approx(0.7)
    return adapted_weight(weight_of(), [(found.bind({"a": (OUT, IN)})["a"], 0.7)], torch.float64)


def close(found: Tensor, adapter: LayerAdapter) -> None:
    expected = torch.from_numpy(weight_oracle(weight_of(), [(adapter, 0.7)])).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", EACH, ids=lambda parts: "+".join(str(part) for part in parts if part))
def test_every_member_comes_back(parts: tuple[Member | None, ...], tmp_path: Path) -> None:
    adapter = made(parts)
    close(restored(adapter, tmp_path / FILE), adapter)


def test_of_padded_ranks_too(tmp_path: Path) -> None:
    adapters = three_adapters(RING, RESIDUALS[1])
    slot = slot_of(adapters)
    for number, adapter in enumerate(adapters):
        close(restored(adapter, tmp_path / f"{number}{FILE}", slot), adapter)


def test_blocks_that_no_cayley_map_gives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a\.transform: blocks that no Cayley map gives"):
        restored(made((SERIES[0], None, None, None)), tmp_path / FILE)
    half_turn = {"strength": torch.ones(1), "a.transform.blocks": -torch.eye(2).expand(3, 2, 2).contiguous()}
    write_adapter_file(tmp_path / "b", half_turn, 1)
    with pytest.raises(ArtifactError, match="blocks that no Cayley map gives"):
        restored_adapter(tmp_path / "b")


def test_a_written_file_is_converted(
    base: Base, two_slots: Artifact, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two slots one is taken; the weights are those that the checkpoint makes."""
    file = tmp_path / "renamed"
    write_adapters(two_slots, [f"{adapter_folder}=0.6"], tmp_path / FILE)
    (tmp_path / FILE).rename(file)
    assert run_cli(["inspect", file]) == 0
    assert "TLoRA" in capsys.readouterr().out
    assert run_cli(["convert", file, "-o", tmp_path / "out"]) == 0
    again = load_adapter(tmp_path / "out")
    assert again.config.strength == pytest.approx(0.6)
    (first,), (second,) = (open_adapters([str(folder)], base) for folder in (adapter_folder, tmp_path / "out"))
    assert first.layers.keys() == second.layers.keys()
    weights = weights_of(base)
    for path, layer in first.layers.items():
        one, other = (adapted_weight(weights[f"{path}.weight"], [(x, 1.0)]) for x in (layer, second.layers[path]))
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    assert run_cli(["merge", "random:tiny", file, "-o", tmp_path / "merged"]) == 1
    assert "trexport convert" in capsys.readouterr().err
    # and as a LoRA of others, multiplied by its strength
    (lora,) = open_adapters(["random:lora:3=0.5"], base)
    slot = Slot("", {path: LayerSlot.of(layer) for path, layer in lora.layers.items()})
    write_adapter_file(tmp_path / FILE, slot.tensors(lora.layers, 0.5, "x"), 1)
    assert run_cli(["convert", tmp_path / FILE, "-o", tmp_path / "k.safetensors", "--to", "kohya"]) == 0
    (kohya,) = open_adapters([str(tmp_path / "k.safetensors")], base)
    for path, layer in lora.layers.items():
        torch.testing.assert_close(kohya.layers[path].residual.delta(), 0.5 * layer.residual.delta(), rtol=0, atol=1e-6)


def test_files_that_are_not_ours_or_hold_several(two_slots: Artifact, bank: Artifact, tmp_path: Path) -> None:
    write_adapters(two_slots, ["random:tlora:2:6", "random:lora:3"], tmp_path / "two.onnx_adapter")
    with pytest.raises(ArtifactError, match=r"2 adapters inside, of adapter_0\., adapter_1\.; expected one"):
        restored_adapter(tmp_path / "two.onnx_adapter")
    write_adapters(bank, ["random:tlora:2:6"], tmp_path / "bank.onnx_adapter")
    with pytest.raises(ArtifactError, match="a file for a bank"):
        restored_adapter(tmp_path / "bank.onnx_adapter")


ONE = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.layers.0.attn.qkv.lora_A.weight": ONE}, "1 of 1 tensors are none that trexport adapter writes"),
        ({"strength": ONE[0, :1], "a.residual.lora_A.weight": ONE * np.nan}, "finite ones"),
        ({"strength": ONE[0, :1], "a.residual.x": ONE}, r"a\.residual: of no member that is known: x"),
        ({"strength": ONE[0, :1], "a.residual.lora_A.weight": ONE}, "a.residual"),
        ({"strength": ONE[0, :1], "a.transform.core.0": ONE}, "a.transform"),
        ({"strength": ONE[0, :1], "a.transform.blocks": ONE}, "a.transform"),
    ],
)
def test_wrong_tensors(
    tensors: dict[str, np.ndarray], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = onnxruntime.AdapterFormat()
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    adapter.export_adapter(str(tmp_path / FILE))  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=says):
        restored_adapter(tmp_path / FILE)
    assert run_cli(["convert", tmp_path / FILE, "-o", tmp_path / "out"]) == 1
    assert capsys.readouterr().err.count("\n") <= 3
    assert not (tmp_path / "out").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    adapter = made((None, RESIDUALS[1], None, None))
    write_adapter_file(tmp_path / FILE, Slot("", {"a": LayerSlot.of(adapter)}).tensors({"a": adapter}, 1.0, "x"), 1)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="no adapter file of ONNX Runtime"):
        restored_adapter(tmp_path / FILE)
