"""The exported model, against the torch module it came from."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.trexport.helpers import SIZES, copy_of, leftovers
from tests.trexport.pipelines import edit_json
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, OnnxFile
from trexport.errors import ExportError, UsageError
from trexport.graph import export, traced
from trexport.graph.export import ExportOptions, export_onnx, plan_export
from trexport.graph.opset import choose_opset
from trexport.graph.traced import traced_graph
from trexport.models.adapters import open_adapters
from trexport.models.architectures import spec_of
from trexport.models.base import Base, open_base
from trexport.models.model import first_output, load_model, merge_into_, random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session


def failing(*args: object, **kwargs: object) -> None:
    raise torch.onnx.OnnxExporterError("first line\nno rule for this operator")


def run(artifact: Artifact, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    with BACKENDS["onnxruntime"].load(OnnxFile(artifact.onnx_path, artifact.manifest.io), "cpu") as runner:
        return runner(feeds)["out_sample"]


def merged_model(base: Base, adapter: str) -> torch.nn.Module:
    model = load_model(base)
    merge_into_(model, open_adapters([adapter], base))
    return model


def test_layout_is_optimum_s_and_the_checker_passes(onnx_artifact: Artifact) -> None:
    assert leftovers(onnx_artifact.folder) == ["trexport.json", "unet"]
    assert leftovers(onnx_artifact.folder / "unet") == ["config.json", "model.onnx", "model.onnx_data"]
    onnx.checker.check_model(str(onnx_artifact.onnx_path), full_check=True)


def test_initialisers_are_the_parameters_by_name_and_bit(
    onnx_artifact: Artifact, base: Base, adapter_folder: Path
) -> None:
    graph = onnx.load(onnx_artifact.onnx_path).graph
    held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    model = merged_model(base, f"{adapter_folder}=0.7")
    for name, parameter in model.named_parameters():
        assert np.array_equal(held[name], parameter.numpy()), name


@pytest.mark.parametrize(
    "sizes",
    [SIZES, {"batch_size": 1, "height": 14, "width": 6, "sequence_length": 9}, {**SIZES, "batch_size": 7}],
)
def test_free_axes_are_free(onnx_artifact: Artifact, base: Base, adapter_folder: Path, sizes: dict[str, int]) -> None:
    feeds = random_feeds(onnx_artifact.manifest.io, sizes, seed=3, timestep=17.5)
    with torch.inference_mode():
        expected = first_output(merged_model(base, f"{adapter_folder}=0.7"), feeds)
    assert relative_l2(run(onnx_artifact, feeds), expected) <= 1e-5


def test_half_precision_is_half_everywhere_but_the_timestep(half_artifact: Artifact) -> None:
    graph = onnx.load(half_artifact.onnx_path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert types == {"sample": half, "timestep": single, "encoder_hidden_states": half, "out_sample": half}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {"sample": [2, 4, 8, 12], "timestep": [], "encoder_hidden_states": [2, 5, 24]}
    assert half_artifact.manifest.opset == 20


def test_nothing_of_this_machine_is_in_the_file(onnx_artifact: Artifact) -> None:
    content = onnx_artifact.onnx_path.read_bytes()
    assert str(Path(export.__file__).parent).encode() not in content
    assert b"site-packages" not in content


def test_the_same_inputs_give_the_same_bytes(
    half_artifact: Artifact, base: Base, adapter_folder: Path, tmp_path: Path
) -> None:
    fixed = {"batch_size": 2, "height": 8, "width": 12, "sequence_length": 5}
    export_onnx(base, open_adapters([str(adapter_folder)], base), tmp_path / "x", ExportOptions("fp16", fixed=fixed))
    assert open_artifact(tmp_path / "x").manifest.files == half_artifact.manifest.files


def test_a_graph_traced_for_other_weights_gives_the_same_bytes(
    half_artifact: Artifact, base: Base, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions("fp16", fixed={"batch_size": 2, "height": 8, "width": 12, "sequence_length": 5})
    monkeypatch.setattr(traced, "_latest", OrderedDict())
    export_onnx(base, [], tmp_path / "x", options)
    monkeypatch.setattr(torch.onnx, "export", failing)
    export_onnx(base, open_adapters([str(adapter_folder)], base), tmp_path / "y", options)
    files = [open_artifact(tmp_path / name).manifest.files for name in ("x", "y")]
    assert files[1] == half_artifact.manifest.files
    assert files[0].keys() == files[1].keys()
    assert files[0] != files[1]  # the weights' file


@pytest.mark.parametrize(
    ("base_changes", "option_changes"),
    [
        ({"norm_num_groups": 8}, {}),  # of no shape
        ({"act_fn": "gelu"}, {}),
        ({}, {"dtype": "bf16"}),
        ({}, {"opset": 18}),
        ({}, {"fixed": SIZES | {"batch_size": 3}}),
        ({}, {"fixed": {axis: size for axis, size in SIZES.items() if axis != "batch_size"}}),
        ({}, {"timestep_per_sample": True}),
    ],
)
def test_another_model_or_another_shape_is_traced_anew(
    base_changes: dict[str, Any],
    option_changes: dict[str, Any],
    unet_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ExportOptions(fixed=SIZES)
    monkeypatch.setattr(traced, "_latest", OrderedDict())  # without what other tests have traced
    export_onnx(open_base(str(unet_folder)), [], tmp_path / "x", options)
    copy_of(unet_folder, tmp_path / "base")
    edit_json(tmp_path / "base" / "config.json", **base_changes)
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(ExportError, match="no rule for this operator"):
        export_onnx(open_base(str(tmp_path / "base")), [], tmp_path / "y", replace(options, **option_changes))


def test_the_weights_of_a_traced_model_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_latest", OrderedDict())
    base = open_base("random:clip-tiny")
    model = load_model(base)
    sizes = {"batch_size": 2, "sequence_length": 5}
    spec = spec_of(base.config, "fp32", sizes)
    feeds = base.architecture.arguments(random_feeds(spec, sizes))
    graph = traced_graph(model, base.config, (), feeds, spec, None, 23, "text_encoder")
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    assert len(held) <= len(graph.graph.initializers)
    del model, graph
    gc.collect()
    assert not [reference for reference in held if reference() is not None]
    assert traced._latest


def test_sdxl_s_inputs(tmp_path: Path) -> None:
    base = open_base("random:tiny-sdxl")
    adapters = open_adapters(["random:tlora-star:2:4"], base)
    export_onnx(base, adapters, tmp_path / "x", ExportOptions(opset=18, fixed=SIZES))
    artifact = open_artifact(tmp_path / "x")
    assert (artifact.manifest.opset, artifact.manifest.opset_reason) == (18, "asked for")
    assert [t.name for t in artifact.manifest.io.inputs][3:] == ["text_embeds", "time_ids"]
    feeds = random_feeds(artifact.manifest.io, SIZES, seed=1)
    with torch.inference_mode():
        expected = first_output(merged_model(base, "random:tlora-star:2:4"), feeds)
    assert relative_l2(run(artifact, feeds), expected) <= 1e-5


def test_opsets() -> None:
    assert choose_opset("fp32").opset == 23
    # measured: attention with heads of 160 is wrong in ONNX Runtime's CUDA kernel of opset 23
    assert choose_opset("fp16").opset == 20
    assert choose_opset("bf16").opset == 22
    with pytest.raises(UsageError, match="22 to 23"):  # Conv of opset 11 does not take bfloat16
        choose_opset("bf16", 20)
    assert choose_opset("fp16", 21).opset == 21
    with pytest.raises(UsageError, match="opset 17"):
        choose_opset("fp32", 17)


def test_impossible_sizes_are_refused_before_anything(base: Base, tmp_path: Path) -> None:
    for axis, size in (("height", 7), ("width", 0), ("batch_size", 0)):
        with pytest.raises(UsageError, match=axis):
            plan_export(base, [], tmp_path / "x", ExportOptions(fixed={axis: size}))
    assert leftovers(tmp_path) == []


def test_a_failed_export_leaves_nothing(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_latest", OrderedDict())
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(ExportError, match="no rule for this operator"):
        export_onnx(base, [], tmp_path / "x", ExportOptions(fixed=SIZES))
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def per_sample(tmp_path_factory: pytest.TempPathFactory, base: Base, adapter_folder: Path) -> Artifact:
    """Merged, a timestep for each sample, the batch free."""
    folder = tmp_path_factory.mktemp("onnx") / "per_sample"
    fixed = {axis: size for axis, size in SIZES.items() if axis != "batch_size"}
    options = ExportOptions(timestep_per_sample=True, fixed=fixed)
    export_onnx(base, open_adapters([str(adapter_folder)], base), folder, options)
    return open_artifact(folder)


def test_samples_of_a_batch_may_be_at_different_steps(per_sample: Artifact) -> None:
    base, adapters = per_sample.sources()
    timestep = next(tensor for tensor in per_sample.manifest.io.inputs if tensor.name == "timestep")
    assert timestep.axes == ("batch_size",)
    model = load_model(base)
    merge_into_(model, adapters)
    feeds = random_feeds(per_sample.manifest.io, SIZES | {"batch_size": 3}, seed=2)
    feeds["timestep"] = torch.tensor([1.0, 999.0, 37.5])
    with BACKENDS["onnxruntime"].load(OnnxFile(per_sample.onnx_path, per_sample.manifest.io), "cpu") as runner:
        found = runner(feeds)["out_sample"]
        for row in range(3):  # each alone, at its own step
            own = {name: tensor[row : row + 1] for name, tensor in feeds.items()} | {"timestep": feeds["timestep"][row]}
            with torch.inference_mode():
                assert relative_l2(found[row : row + 1], first_output(model, own)) <= 1e-5
        scalar = runner({**feeds, "timestep": torch.tensor(37.5)})["out_sample"]
        assert relative_l2(scalar[2], found[2]) <= 1e-6
    with Session(per_sample) as session:
        assert torch.equal(session.run(feeds)["out_sample"], found)
        assert relative_l2(session.run({**feeds, "timestep": torch.tensor(37.5)})["out_sample"][2], found[2]) <= 1e-6
        with pytest.raises(UsageError, match="timestep"):
            session.run({**feeds, "timestep": torch.tensor([1.0, 2.0])})


def test_a_step_for_each_sample_is_validated(per_sample: Artifact) -> None:
    base, adapters = per_sample.sources()
    options = ValidateOptions(timesteps=(1, 500), seeds=(0,), trajectory_steps=2, locate=False)
    assert validate(per_sample, base, adapters, "cpu", options).passed
