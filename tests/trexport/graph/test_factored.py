"""The factored form of a whole UNet, in the runtimes that take it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.helpers import bits
from tests.trexport.helpers import SIZES
from trexport.adapter_file import adapter_tensors, factored_of, read_adapters, write_adapters
from trexport.artifact import Artifact, open_artifact
from trexport.errors import ArtifactError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.ops import DOMAIN
from trexport.graph.ops.plan import PATHS
from trexport.graph.ops.plan import Path as PlanPath
from trexport.inspecting import inspect
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import attach_all_, first_output, load_model, random_feeds, rows_of_layers
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trlora.errors import CheckpointError

QUICK = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=2)


def export(base: Base, adapters: list[str], folder: Path, options: FactoredOptions, dtype: str = "fp32") -> Artifact:
    fixed = None if dtype == "fp32" else SIZES
    export_onnx(
        base,
        open_adapters(adapters, base),
        folder,
        ExportOptions(dtype, factored=options, fixed=fixed),  # type: ignore[arg-type]
    )
    return open_artifact(folder)


@pytest.fixture(scope="module", params=PATHS)
def artifact(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path
) -> Artifact:
    """One adapter at strength 0.7, one path for every layer."""
    path: PlanPath = request.param
    folder = tmp_path_factory.mktemp("factored") / path
    return export(base, [f"{adapter_folder}=0.7"], folder, FactoredOptions(path=path))


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    folder = tmp_path_factory.mktemp("factored") / "blank"
    return export(base, [str(adapter_folder)], folder, FactoredOptions(blank=True, path="activations"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path, lora_folder: Path) -> Artifact:
    """Two adapters of different kinds, as planned."""
    folder = tmp_path_factory.mktemp("factored") / "pair"
    return export(base, [f"{adapter_folder}=0.5", f"{lora_folder}=0.8"], folder, FactoredOptions())


def session_of(artifact: Artifact) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(artifact.onnx_path, options, providers=["CPUExecutionProvider"])


def run(artifact: Artifact, fed: dict[str, Tensor] | None = None, adapter: Path | None = None) -> Tensor:
    feeds = random_feeds(artifact.manifest.io, SIZES, seed=4) | (fed or {})
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    return torch.from_numpy(session_of(artifact).run(None, arrays, options)[0])


def torch_output(artifact: Artifact, base: Base, adapters: list[str]) -> Tensor:
    model = load_model(base)
    attach_all_(model, open_adapters(adapters, base))
    with torch.inference_mode():
        return first_output(model, random_feeds(artifact.manifest.io, SIZES, seed=4))


def test_one_operator_an_adapted_layer(artifact: Artifact, adapter_folder: Path) -> None:
    onnx.checker.check_model(str(artifact.onnx_path), full_check=True)
    model = onnx.load(artifact.onnx_path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert len(nodes) == len(factored_of(artifact).plan) == 32
    assert {node.name for node in nodes} == set(factored_of(artifact).plan)
    held = {initializer.name for initializer in model.graph.initializer}
    for node in nodes:
        assert f"{node.name}.weight" in node.input
        assert {"strength", f"{node.name}.transform.core.0", f"{node.name}.residual.row_core.2"} <= set(
            node.input
        ) & held
    assert {entry.domain: entry.version for entry in model.opset_import}[DOMAIN] == 1
    assert all(function.doc_string for function in model.functions)


def test_it_equals_torch_with_the_adapter_attached(artifact: Artifact, base: Base, adapter_folder: Path) -> None:
    report = validate(artifact, base, open_adapters([f"{adapter_folder}=0.7"], base), "cpu", QUICK)
    assert report.passed, report.failures
    assert run(artifact).isfinite().all()


def test_the_reference_evaluator_agrees(artifact: Artifact) -> None:
    feeds = {name: t.numpy() for name, t in random_feeds(artifact.manifest.io, SIZES, seed=4).items()}
    evaluator = onnx.reference.ReferenceEvaluator(str(artifact.onnx_path))
    found = torch.from_numpy(np.asarray(next(iter(evaluator.run(None, feeds)))))
    assert relative_l2(found, run(artifact)) <= 1e-5


def test_tensorrt_rtx_parses_it(artifact: Artifact) -> None:
    tensorrt_rtx: Any = importlib.import_module("tensorrt_rtx")  # its names are not in its type stubs

    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert parser.parse_from_file(str(artifact.onnx_path)), [parser.get_error(i) for i in range(parser.num_errors)]
    assert network.num_layers > 0


def test_strength_zero_is_the_base(artifact: Artifact, blank: Artifact, base: Base) -> None:
    plain = run(blank)
    found = run(artifact, {"strength": torch.zeros(1)})
    # a rebuilt weight is not packed beforehand, which is another kernel
    assert relative_l2(found, plain) <= 1e-6
    if next(iter(factored_of(artifact).plan.values())).path != "weight":
        assert bits(found) == bits(plain)
    assert relative_l2(plain, torch_output(blank, base, [])) <= 1e-5


def test_a_blank_model_is_the_base_to_the_bit(blank: Artifact, base: Base, tmp_path: Path) -> None:
    export_onnx(base, [], tmp_path / "base")
    assert bits(run(blank)) == bits(run(open_artifact(tmp_path / "base")))
    assert blank.manifest.adapters == ()


def test_other_adapters_are_fed_as_tensors_or_as_a_file(
    artifact: Artifact, blank: Artifact, base: Base, tmp_path: Path
) -> None:
    other = "random:tlora:1:4"  # of lower rank than the slot, and other values
    expected = torch_output(artifact, base, [f"{other}=0.6"])
    assert relative_l2(torch_output(artifact, base, []), expected) > 1e-3
    for taker in (artifact, blank):
        tensors = adapter_tensors(taker, [f"{other}=0.6"])
        assert relative_l2(run(taker, tensors), expected) <= 1e-5
        file = tmp_path / f"{taker.folder.name}.onnx_adapter"
        write_adapters(taker, [f"{other}=0.6"], file)
        assert bits(run(taker, adapter=file)) == bits(run(taker, tensors))
        read = read_adapters(taker, file)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_plain_tensors_are_the_same(blank: Artifact, tmp_path: Path) -> None:
    write_adapters(blank, ["random:tlora:2:6"], tmp_path / "a.safetensors")
    tensors, expected = read_adapters(blank, tmp_path / "a.safetensors"), adapter_tensors(blank, ["random:tlora:2:6"])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_blank_artifact_is_validated_with_any_adapter(blank: Artifact, adapter_folder: Path) -> None:
    base, adapters = blank.sources(None, [f"{adapter_folder}=0.9"])
    report = validate(blank, base, adapters, "cpu", QUICK)
    assert report.passed, report.failures
    assert report.worst.effect > 1e-3
    base, adapters = blank.sources()
    assert validate(blank, base, adapters, "cpu", QUICK).passed


def test_two_adapters_each_with_its_strength(
    pair: Artifact, base: Base, adapter_folder: Path, lora_folder: Path
) -> None:
    assert relative_l2(run(pair), torch_output(pair, base, [f"{adapter_folder}=0.5", f"{lora_folder}=0.8"])) <= 1e-5
    only = run(pair, {"adapter_1.strength": torch.zeros(1)})
    assert relative_l2(only, torch_output(pair, base, [f"{adapter_folder}=0.5"])) <= 1e-5
    swapped = adapter_tensors(pair, ["random:tlora:2:6=1.5"])
    assert swapped["adapter_1.strength"] == 0
    assert relative_l2(run(pair, swapped), torch_output(pair, base, ["random:tlora:2:6=1.5"])) <= 1e-5


def test_half_precision(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    half = export(base, [str(adapter_folder)], tmp_path / "half", FactoredOptions(), "fp16")
    cores = [i for i in onnx.load(half.onnx_path).graph.initializer if ".core." in i.name]
    assert cores
    assert {core.data_type for core in cores} == {onnx.TensorProto.FLOAT}
    report = validate(half, base, open_adapters([str(adapter_folder)], base), "cpu", QUICK)
    assert report.passed, report.failures


def test_the_same_inputs_give_the_same_bytes(pair: Artifact, base: Base, tmp_path: Path) -> None:
    adapters = [f"{a.name}={a.strength}" for a in pair.manifest.adapters]
    again = export(base, adapters, tmp_path / "again", FactoredOptions())
    assert again.manifest.files == pair.manifest.files


def test_the_plan_is_stored_and_shown(pair: Artifact, base: Base) -> None:
    found = inspect(str(pair.folder))
    factored = factored_of(pair)
    assert found.facts["slots"] == 2
    assert sum(found.facts["plan"].values()) == len(factored.plan)
    shown = {row[0]: row[1] for row in found.rows}
    assert all(shown[path] == f"{layer.path}, {layer.tokens}" for path, layer in factored.plan.items())
    assert {p: layer.tokens for p, layer in factored.plan.items()} == rows_of_layers(
        base, factored.optimum, list(factored.plan)
    )


def test_rows_are_what_the_layers_see(base: Base) -> None:
    model = load_model(base)
    seen: dict[str, int] = {}
    paths = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ]
    for path in paths:
        layer = model.get_submodule(path)

        def record(module: torch.nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            seen[path] = inputs[0].shape[:-1].numel()

        layer.register_forward_pre_hook(record)
    sizes = {"batch_size": 3, "height": 12, "width": 8, "sequence_length": 5}
    from trexport.models.architectures import spec_of

    first_output(model, random_feeds(spec_of(base.config, "fp32"), sizes))
    assert rows_of_layers(base, sizes, paths) == seen
    assert seen[paths[0]] == 15


def test_wrong_adapters_are_refused(blank: Artifact, pair: Artifact, lora_folder: Path, tmp_path: Path) -> None:
    for wrong in ("random:tlora:3:6", "random:tlora:2:7", str(lora_folder)):
        with pytest.raises(ArtifactError, match="export for this adapter's shapes"):
            write_adapters(blank, [wrong], tmp_path / "x.onnx_adapter")
    with pytest.raises(UsageError, match="2 adapters given, the graph takes 1"):
        write_adapters(blank, ["random:tlora:2:6", "random:lora:3"], tmp_path / "x.onnx_adapter")
    with pytest.raises(UsageError, match="onnx_adapter"):
        write_adapters(blank, ["random:tlora:2:6"], tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []
    write_adapters(pair, ["random:tlora:2:6"], tmp_path / "of_pair.onnx_adapter")
    with pytest.raises(ArtifactError, match="another artifact"):
        read_adapters(blank, tmp_path / "of_pair.onnx_adapter")
    with pytest.raises(FileExistsError):
        write_adapters(pair, ["random:tlora:2:6"], tmp_path / "of_pair.onnx_adapter")
    (tmp_path / "junk.onnx_adapter").write_bytes(b"junk" * 20)
    with pytest.raises(ArtifactError, match="no adapter file"):
        read_adapters(blank, tmp_path / "junk.onnx_adapter")


def test_an_adapter_with_nan_is_refused(blank: Artifact, adapter_folder: Path, tmp_path: Path) -> None:
    import safetensors.torch

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter_folder / "adapter_config.json").read_bytes())
    tensors = safetensors.torch.load_file(adapter_folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    safetensors.torch.save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        write_adapters(blank, [str(broken)], tmp_path / "x.onnx_adapter")


def test_a_merged_artifact_takes_no_adapter_file(onnx_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="merged artifact"):
        write_adapters(onnx_artifact, ["random:tlora:2:6"], tmp_path / "x.onnx_adapter")


def test_no_adapter_no_factored_form(base: Base, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an adapter"):
        export(base, [], tmp_path / "x", FactoredOptions())
    assert not (tmp_path / "x").exists()
