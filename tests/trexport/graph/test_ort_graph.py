"""The graph that ONNX Runtime's CUDA provider gets computes what the exported one does, and every pass finds its places."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.trexport.contrib import evaluated
from tests.trexport.helpers import SIZES, run_onnx
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, OnnxFile
from trexport.backends.onnxruntime import OnnxRuntime
from trexport.errors import ArtifactError, UsageError
from trexport.graph import ort_graph as module
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.matching import MICROSOFT
from trexport.graph.ort_graph import PASSES, ort_graph, usual_passes
from trexport.graph.passes.bias_split_gelu import bias_split_gelu
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.session.sources import fed_tensors

ARTIFACTS = ["onnx_artifact", "plain", "half_artifact", "two_slots", "bank", "swappable"]
"""Opset 23 and 20, free axes and fixed ones, float32 and float16, all forms."""
ON_CPU = ("neutral", "multi_head_attention", "skip_layer_norm")
PLACES = {
    "neutral": 17,  # 12 quotients of residual blocks and attentions, and one of the timestep's sinusoid
    "joined_products": 9,  # 5 of the 6 keys and values of the text that are 32 wide, 4 of the 5 shifts that are 64 wide
    "multi_head_attention": 8,  # 4 blocks, self and cross
    "bias_split_gelu": 4,
    "skip_layer_norm": 8,
    "bias_add": 4,
    "group_norm": 21,
    "nhwc_conv": 33,
    "transposes": 114,  # all but that of the input and that of the output
    "pointwise": 5,  # 2 shortcuts, and behind 3 transformers, where a residual block comes next
    "skip_group_norm": 15,
    "layer_norm": 0,
}
FIXED = {"pointwise": 9, "layer_norm": 4}
"""Of images of a fixed size."""
FACTORED = {"joined_products": 4}
"""Where the adapted layers are no products yet."""
DIFFERENT = {
    "half_artifact": FIXED,
    "swappable": FIXED,
    "two_slots": FIXED | FACTORED,
    "bank": FIXED | FACTORED,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Artifact:
    """Attention as products, normalisations written out, all axes free: as fp16 is exported, in float32."""
    folder = tmp_path_factory.mktemp("onnx") / "plain"
    export_onnx(base, [], folder, ExportOptions("fp32", 20))
    return open_artifact(folder)


@pytest.fixture
def narrow_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths of the test UNet's gates, which the CUDA kernel does not have, allowed."""
    narrow = partial(bias_split_gelu, widths=(64, 128))
    monkeypatch.setattr(module, "PASSES", {**PASSES, "bias_split_gelu": narrow})


def whole(graph: bytes, artifact: Artifact) -> onnx.ModelProto:
    model = onnx.load_from_string(graph)
    onnx.load_external_data_for_model(model, str(artifact.onnx_path.parent))
    return model


def feeds_of(artifact: Artifact) -> dict[str, Tensor]:
    sizes = SIZES | {"height": 8, "width": 12} | artifact.manifest.io.fixed_sizes()
    return random_feeds(artifact.manifest.io, sizes, seed=1) | fed_tensors(artifact, [], "cpu")


@pytest.mark.usefixtures("narrow_gates")
@pytest.mark.parametrize("which", ARTIFACTS)
def test_it_computes_what_the_artifact_does(which: str, request: pytest.FixtureRequest) -> None:
    artifact: Artifact = request.getfixturevalue(which)
    found = ort_graph(artifact.onnx_path)
    assert found.replaced == PLACES | DIFFERENT.get(which, {})
    model = whole(found.model, artifact)
    feeds = feeds_of(artifact)
    (output,) = evaluated(model, feeds)
    expected = run_onnx(artifact.onnx_path, feeds)["out_sample"]
    assert output.dtype == expected.dtype
    half = artifact.manifest.dtype == "fp16"
    assert relative_l2(output.float(), expected.float()) <= (2e-3 if half else 2e-6)


@pytest.mark.usefixtures("narrow_gates")
@pytest.mark.parametrize("which", ARTIFACTS)
def test_what_is_left(which: str, request: pytest.FixtureRequest) -> None:
    """Two transposes of images: one at each end. No attention, convolution or normalisation in pieces."""
    artifact: Artifact = request.getfixturevalue(which)
    graph = whole(ort_graph(artifact.onnx_path).model, artifact).graph
    folded = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in folded for name in node.input if name):
            folded.update(node.output)
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] not in folded]
    assert [node.input[0] for node in turned[:1]] == ["sample"]
    assert [node.output[0] for node in turned[1:]] == ["out_sample"]
    counts = Counter(node.op_type for node in graph.node)
    gone = ("Conv", "Softmax", "Attention", "InstanceNormalization", "GroupNormalization", "Gelu")
    assert {name: counts[name] for name in gone if counts[name]} == {}
    assert counts["Sigmoid"] == 2  # of the timestep's embedding


@pytest.mark.parametrize("which", ARTIFACTS)
def test_inputs_outputs_and_weights_stay(which: str, request: pytest.FixtureRequest) -> None:
    artifact: Artifact = request.getfixturevalue(which)
    before = {path: path.read_bytes() for path in Path(artifact.folder).rglob("*") if path.is_file()}
    found = onnx.load_from_string(ort_graph(artifact.onnx_path).model)
    assert before == {path: path.read_bytes() for path in Path(artifact.folder).rglob("*") if path.is_file()}
    original = onnx.load(artifact.onnx_path, load_external_data=False)
    assert [v.name for v in found.graph.input] == [v.name for v in original.graph.input]
    assert list(found.graph.output) == list(original.graph.output)

    def external(model: onnx.ModelProto) -> dict[str, bytes]:
        kept = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        return {t.name: t.SerializeToString(deterministic=True) for t in kept}

    assert external(found) == external(original)


@pytest.mark.usefixtures("narrow_gates")
@pytest.mark.parametrize("which", ARTIFACTS)
def test_onnx_runtime_knows_the_operators(which: str, request: pytest.FixtureRequest) -> None:
    """Without CUDA it lacks kernels, which it looks for when types and shapes of all operators have been found right."""
    artifact: Artifact = request.getfixturevalue(which)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = whole(ort_graph(artifact.onnx_path).model, artifact).SerializeToString()
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*NhwcConv"):
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("which", [name for name in ARTIFACTS if name != "half_artifact"])
def test_what_the_cpu_has_kernels_for_runs_there(which: str, request: pytest.FixtureRequest) -> None:
    """ONNX Runtime's own kernels agree with our reading of its operators, through the backend that loads them."""
    artifact: Artifact = request.getfixturevalue(which)
    spec, feeds = artifact.manifest.io, feeds_of(artifact)
    constants = fed_tensors(artifact, [], "cpu")
    source = OnnxFile(artifact.onnx_path, spec, {name: feeds[name] for name in constants})
    given = {tensor.name: feeds[tensor.name] for tensor in spec.inputs}
    with BACKENDS["onnxruntime"].load(source, "cpu") as runner:
        expected = runner(given)["out_sample"]
        assert runner.step(given).note is None
    with OnnxRuntime(ON_CPU).load(source, "cpu") as runner:
        assert relative_l2(runner(given)["out_sample"], expected) <= 2e-6
        step = runner.step(given)
        step.run()
        assert relative_l2(step.outputs["out_sample"], expected) <= 2e-6
        assert "multi_head_attention 8, skip_layer_norm 8" in (step.note or "")


def test_passes_by_name(plain: Artifact) -> None:
    found = ort_graph(plain.onnx_path, ["group_norm", "neutral"])
    assert found.replaced == {"neutral": 17, "group_norm": 21}  # in their own order
    assert str(found) == "neutral 17, group_norm 21"
    domains = {node.domain for node in onnx.load_from_string(found.model).graph.node}
    assert domains == {"", MICROSOFT}
    with pytest.raises(UsageError, match="groupnorm"):
        ort_graph(plain.onnx_path, ["groupnorm"])


def test_where_torch_is_to_be_deterministic_so_are_the_passes() -> None:
    assert usual_passes() == tuple(PASSES)
    torch.use_deterministic_algorithms(True)
    try:
        assert usual_passes() == tuple(name for name in PASSES if name not in ("group_norm", "skip_group_norm"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_gates_of_widths_without_a_kernel_stay(plain: Artifact) -> None:
    assert ort_graph(plain.onnx_path).replaced == PLACES | {"bias_split_gelu": 0}


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        ort_graph(tmp_path / "model.onnx")


def test_the_oracle_tells_a_wrong_graph(plain: Artifact) -> None:
    """A model with one weight changed is told apart, so that agreement means something."""
    model = whole(ort_graph(plain.onnx_path).model, plain)
    feeds = feeds_of(plain)
    (right,) = evaluated(model, feeds)
    (tensor,) = [t for t in model.graph.initializer if t.name == "down_blocks.0.resnets.0.norm2.weight"]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] += np.float32(0.1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (wrong,) = evaluated(model, feeds)
    assert torch.isfinite(wrong).all()
    assert relative_l2(wrong, right) > 1e-4
