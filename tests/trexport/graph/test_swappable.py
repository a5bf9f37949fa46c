"""The swappable form as files: what other runtimes find in them, and what validation says of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import SIZES, damaged, drawn_by_torch, merged_in_float64, run_cli, run_onnx, weights_of
from trexport.adapter_file import adapter_tensors, factored_of, swappable_of
from trexport.artifact import Artifact, open_artifact
from trexport.errors import ArtifactError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.swappable import Swappable, SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session

QUICK = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=2, locate=False)
SECOND = "random:tlora:1:4"


def merge_path(artifact: Artifact) -> Path:
    return artifact.onnx_path.with_name("merge.onnx")


def feeds_of(artifact: Artifact, batch: int = SIZES["batch_size"]) -> dict[str, Tensor]:
    return random_feeds(artifact.manifest.io, SIZES | {"batch_size": batch}, seed=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Artifact:
    """The base alone, of the same fixed sizes."""
    folder = tmp_path_factory.mktemp("onnx") / "plain"
    export_onnx(base, [], folder, ExportOptions(fixed=SIZES))
    return open_artifact(folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """Swappable in float16, with its adapter on record."""
    folder = tmp_path_factory.mktemp("onnx") / "half"
    options = ExportOptions("fp16", swappable=SwappableOptions(), fixed=SIZES)
    export_onnx(base, open_adapters([f"{adapter_folder}=0.7"], base), folder, options)
    return open_artifact(folder)


def test_both_models_are_whole(swappable: Artifact, half: Artifact) -> None:
    for artifact in (swappable, half):
        names = {path.name for path in artifact.onnx_path.parent.iterdir()}
        assert names == {"config.json", "merge.onnx", "model.onnx", "model.onnx_data"}
        for path in (artifact.onnx_path, merge_path(artifact)):
            onnx.checker.check_model(str(path), full_check=True)
        assert f"unet/{merge_path(artifact).name}" in artifact.manifest.files


def test_the_manifest_tells_the_form(swappable: Artifact, half: Artifact, plain: Artifact) -> None:
    assert swappable.manifest.form == half.manifest.form == "swappable"
    assert swappable.manifest.io == plain.manifest.io
    assert swappable.blank
    assert not half.blank
    assert swappable.manifest.adapters == ()
    assert [adapter.strength for adapter in half.manifest.adapters] == [0.7]
    found = swappable_of(swappable)
    assert len(found.slot.layers) == 32
    assert Swappable.from_dict(found.to_dict()) == found
    assert swappable_of(half).slot != found.slot
    for wrong, refuse in ((swappable, factored_of), (plain, swappable_of)):
        with pytest.raises(ArtifactError, match="expected one of"):
            refuse(wrong)


def test_the_weights_are_stored_once(swappable: Artifact, plain: Artifact, base: Base) -> None:
    unet = onnx.load(swappable.onnx_path, load_external_data=False)
    merge = onnx.load(merge_path(swappable), load_external_data=False)
    stored = {tensor.name: tensor for tensor in unet.graph.initializer}
    layers = swappable_of(swappable).slot.layers
    assert {tensor.name for tensor in merge.graph.initializer} == {f"{path}.weight" for path in layers}
    outside = set[str]()
    for tensor in merge.graph.initializer:
        own = {entry.key: entry.value for entry in tensor.external_data}
        assert own == {entry.key: entry.value for entry in stored[tensor.name].external_data}
        if own:
            assert own["location"] == "model.onnx_data"
            assert not tensor.raw_data
            outside.add(tensor.name)
    weights = weights_of(base)
    assert outside
    assert outside == {f"{path}.weight" for path in layers if weights[f"{path}.weight"].nbytes > 1024}
    sizes = [a.onnx_path.with_name("model.onnx_data").stat().st_size for a in (swappable, plain)]
    assert sizes[0] == sizes[1]


def test_unfed_it_is_the_base_to_the_bit(swappable: Artifact, plain: Artifact) -> None:
    feeds = feeds_of(plain)
    assert bits(run_onnx(swappable.onnx_path, feeds)["out_sample"]) == bits(
        run_onnx(plain.onnx_path, feeds)["out_sample"]
    )


def test_merge_onnx_computes_the_weights_and_the_model_takes_them(
    swappable: Artifact, base: Base, adapter_folder: Path, lora_folder: Path
) -> None:
    given = [(adapter_folder, 0.7), (lora_folder, -1.2)]
    arguments = [f"{folder}={strength}" for folder, strength in given]
    expected, weights = merged_in_float64(base, given), weights_of(base)
    found = run_onnx(merge_path(swappable), adapter_tensors(swappable, arguments))
    assert len(found) == 32
    for name, merged in found.items():
        wanted = expected[name.removeprefix("merged.")]
        assert relative_l2(merged.double(), wanted) <= 1e-6
        assert relative_l2(weights[name.removeprefix("merged.")].double(), wanted) > 1e-3
    feeds = feeds_of(swappable)
    fed = {name.removeprefix("merged."): merged for name, merged in found.items()}
    drawn = run_onnx(swappable.onnx_path, feeds | fed)["out_sample"]
    assert relative_l2(drawn, drawn_by_torch(base, arguments, feeds)) <= 1e-5
    with Session(swappable) as session:
        for name, argument in zip("ab", arguments, strict=True):
            session.load_adapter(name, argument)
        session.activate({"a": None, "b": None})
        assert relative_l2(session.run(feeds)["out_sample"], drawn) <= 1e-6


@pytest.mark.parametrize("which", ["unet", "merge"])
def test_tensorrt_rtx_parses_it(which: str, swappable: Artifact) -> None:
    tensorrt_rtx: Any = importlib.import_module("tensorrt_rtx")  # its names are not in its type stubs
    path = swappable.onnx_path if which == "unet" else merge_path(swappable)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i) for i in range(parser.num_errors)]
    assert network.num_layers > 0


@pytest.mark.parametrize("adapters", [[], [f"{SECOND}=0.9"], ["random:lora:2=1.4", "random:tlora:2:6=0.6"]], ids=str)
def test_a_swappable_artifact_is_validated_with_any_adapters(adapters: list[str], swappable: Artifact) -> None:
    base, bound = swappable.sources(None, adapters)
    report = validate(swappable, base, bound, "cpu", QUICK)
    assert report.passed, report.failures
    assert (report.worst.effect > 1e-3) == bool(adapters)


def test_a_swappable_artifact_with_a_wrong_weight_fails(swappable: Artifact, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    wrong = damaged(swappable, tmp_path / "x", name, 0.5)
    base, bound = wrong.sources(None, [SECOND])
    # the adapted weights are computed from the pristine ones in the damaged model's data file, or fed: try one not adapted
    other = damaged(swappable, tmp_path / "y", "conv_in.weight", 0.5)
    assert not validate(other, base, bound, "cpu", QUICK).passed
    assert not validate(wrong, base, [], "cpu", QUICK).passed


def test_half_precision(half: Artifact, base: Base, adapter_folder: Path) -> None:
    report = validate(half, *half.sources(), "cpu", QUICK)
    assert report.passed, report.failures
    assert report.worst.relative_l2 > 1e-5
    feeds = feeds_of(half)
    with Session(half) as session:
        start = session.run(feeds)["out_sample"]
        assert start.dtype == torch.float16
        session.load_adapter("a", adapter_folder)
        session.activate({"a": 0.7})
        found = session.run(feeds)["out_sample"]
        wide = {name: tensor.float() for name, tensor in feeds.items()}
        expected, plain = drawn_by_torch(base, [f"{adapter_folder}=0.7"], wide), drawn_by_torch(base, [], wide)
        assert relative_l2(found.float(), expected) <= 5e-3
        assert relative_l2(start.float(), plain) <= 5e-3
        assert relative_l2(found.float(), plain) > 2e-2
        with pytest.raises(ArtifactError, match="not finite"):
            session.activate({"a": 1e8})
        assert session.active == {"a": 0.7}
        assert bits(session.run(feeds)["out_sample"]) == bits(found)
        session.deactivate()
        assert bits(session.run(feeds)["out_sample"]) == bits(start)


@pytest.mark.parametrize(
    "flags",
    [
        ["--swappable", "--factored"],
        ["--bank", "2"],
        ["--swappable", "--bank", "2"],
        ["--blank"],
        ["--factored", "--bank", "0"],
    ],
    ids=" ".join,
)
def test_flags_that_do_not_go_together_are_exit_code_2(flags: list[str], tmp_path: Path) -> None:
    assert run_cli(["onnx", "random:tiny", "random:tlora:2:6", *flags, "-o", tmp_path / "x"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--swappable"], ["--factored", "--bank", "2"], ["random:lora:3", "random:lora:2", "--factored", "--bank", "1"]],
    ids=" ".join,
)
def test_no_adapter_or_too_many_are_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    assert run_cli(["onnx", "random:tiny", *arguments, "-o", tmp_path / "x"]) == 2
    assert list(tmp_path.iterdir()) == []
