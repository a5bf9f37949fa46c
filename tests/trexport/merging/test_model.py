"""`merge`, against the formula in float64 and against diffusers' own loader."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from tests.trexport.helpers import leftovers, merged_in_float64, weights_of, write_model
from trexport.errors import TrexportError, UsageError
from trexport.merging import merge, plan_merge
from trexport.models.adapters import open_adapters
from trexport.models.base import WEIGHTS_STEM, Base, open_base
from trexport.models.writer import SafetensorsWriter
from trlora import load_adapter

FILE = f"{WEIGHTS_STEM}.safetensors"


def test_every_weight_is_the_formula_s_and_the_rest_keep_their_bits(
    base: Base, adapter_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    adapters = [(adapter_folder, 0.8), (lora_folder, -1.5)]
    report = merge(base, open_adapters([f"{path}={s}" for path, s in adapters], base), tmp_path / "out")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    assert isinstance(model, UNet2DConditionModel)
    expected = merged_in_float64(base, adapters)
    adapted = {f"{layer}.weight" for path, _ in adapters for layer in load_adapter(path).layers}
    assert {f"{layer.path}.weight" for layer in report.layers} == adapted
    for name, tensor in model.state_dict().items():
        if name in adapted:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, expected[name].float()), name
    originals = weights_of(base)
    for layer in report.layers:
        name = f"{layer.path}.weight"
        change = (expected[name] - originals[name].double()).norm() / originals[name].double().norm()
        assert layer.relative_change == pytest.approx(change.item(), rel=1e-4)


def test_the_same_inputs_give_the_same_bytes(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        merge(base, open_adapters([str(adapter_folder)], base), tmp_path / name)
    files = leftovers(tmp_path / "a")
    assert files == leftovers(tmp_path / "b") == ["config.json", FILE, "trexport.json"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_strength_zero_gives_the_base_s_bits(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    report = merge(base, open_adapters([f"{adapter_folder}=0"], base), tmp_path / "out")
    assert len(report.unchanged) == len(report.layers) > 0
    merged = open_base(str(tmp_path / "out"))
    assert merged.content_hash() == base.content_hash()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, adapter_folder: Path, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "base", open_base("random:tiny"), dtype)
    base = open_base(str(folder))
    merge(base, open_adapters([str(adapter_folder)], base), tmp_path / "out")
    expected = merged_in_float64(base, [(adapter_folder, 1.0)])
    for name, tensor in safetensors.torch.load_file(tmp_path / "out" / FILE).items():
        assert tensor.dtype == dtype
        rounded = expected[name].to(dtype)
        # float32 may fall to the other side of a tie: one unit in the last place, rarely
        unit = torch.finfo(dtype).eps * rounded.abs().double().clamp(min=1e-4)
        assert ((tensor.double() - rounded.double()).abs() <= unit).all(), name
        assert (tensor == rounded).double().mean() > 0.99, name


def test_another_dtype_on_demand(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    merge(base, open_adapters([str(adapter_folder)], base), tmp_path / "out", dtype="fp16")
    tensors = safetensors.torch.load_file(tmp_path / "out" / FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    originals = weights_of(base)
    assert torch.equal(tensors["conv_in.weight"], originals["conv_in.weight"].half())


def test_shards_stay(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(str(base.folder))
    assert isinstance(model, UNet2DConditionModel)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    sharded = open_base(str(tmp_path / "sharded"))
    names = [file.name for file in sharded.weights]
    assert len(names) > 2
    assert sharded.content_hash() == base.content_hash()  # the content's hash, however it lies
    merge(sharded, open_adapters([str(adapter_folder)], sharded), tmp_path / "out")
    assert [file.name for file in open_base(str(tmp_path / "out")).weights] == names
    merge(base, open_adapters([str(adapter_folder)], base), tmp_path / "whole")
    assert open_base(str(tmp_path / "out")).content_hash() == open_base(str(tmp_path / "whole")).content_hash()
    assert isinstance(UNet2DConditionModel.from_pretrained(tmp_path / "out"), UNet2DConditionModel)


@pytest.mark.parametrize("shard_size", ["10GB", "200KB"])
def test_a_variant_s_result_loads_without_naming_it(
    shard_size: str, base: Base, adapter_folder: Path, tmp_path: Path
) -> None:
    model = UNet2DConditionModel.from_pretrained(str(base.folder))
    assert isinstance(model, UNet2DConditionModel)
    model.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size=shard_size)
    opened = open_base(str(tmp_path / "base"), variant="fp16")
    merge(opened, open_adapters([str(adapter_folder)], opened), tmp_path / "out")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, UNet2DConditionModel)
    merge(base, open_adapters([str(adapter_folder)], base), tmp_path / "plain")
    expected = weights_of(open_base(str(tmp_path / "plain")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_pipeline_folder_is_a_base(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(str(base.folder), tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    opened = open_base(str(tmp_path / "pipeline"))
    assert opened.content_hash() == base.content_hash()
    assert merge(opened, open_adapters([str(adapter_folder)], opened), tmp_path / "out").layers


def test_an_output_with_content_is_refused_unless_told(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    adapters = open_adapters([str(adapter_folder)], base)
    with pytest.raises(FileExistsError, match="--overwrite"):
        merge(base, adapters, tmp_path / "out")
    with pytest.raises(FileExistsError):
        plan_merge(base, adapters, tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["mine"]
    merge(base, adapters, tmp_path / "out", overwrite=True)
    assert "mine" not in leftovers(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(
    error: BaseException, base: Base, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    original = SafetensorsWriter.write

    def failing(self: SafetensorsWriter, tensor: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written == 20:
            raise error
        original(self, tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(type(error)):
        merge(base, open_adapters([str(adapter_folder)], base), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_too_little_disk_is_said_before_anything_is_written(
    base: Base, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(TrexportError, match="free"):
        merge(base, open_adapters([str(adapter_folder)], base), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_no_adapter_is_no_merge(base: Base, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        merge(base, [], tmp_path / "out")
