"""The graph that engines are built from computes what the exported one does; ONNX Runtime and NumPy say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from tests.trexport.helpers import SIZES, run_onnx
from trexport.artifact import Artifact
from trexport.errors import ExportError
from trexport.graph.engine_graph import engine_graph
from trexport.graph.passes.attention import attention
from trexport.graph.passes.islands import NORMALISATIONS, islands
from trexport.graph.passes.required import required
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.session.sources import fed_tensors


def whole(graph: bytes, artifact: Artifact) -> onnx.ModelProto:
    """The prepared graph with its weights."""
    model = onnx.load_from_string(graph)
    onnx.load_external_data_for_model(model, str(artifact.onnx_path.parent))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, feeds: dict[str, Tensor]) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["out_sample"], {name: t.numpy() for name, t in feeds.items()})[0])


@pytest.mark.parametrize("which", ["onnx_artifact", "two_slots", "bank", "swappable"])
def test_it_computes_what_the_artifact_does(which: str, request: pytest.FixtureRequest) -> None:
    artifact: Artifact = request.getfixturevalue(which)
    fed = fed_tensors(artifact, [], "cpu")
    model = whole(engine_graph(artifact.onnx_path, fed), artifact)
    required_inputs = {value.name for value in model.graph.input} - {i.name for i in model.graph.initializer}
    assert required_inputs == {tensor.name for tensor in artifact.manifest.io.inputs} | set(fed)
    assert "Attention" not in {node.op_type for node in model.graph.node}
    assert "Attention" in {node.op_type for node in onnx.load(artifact.onnx_path, load_external_data=False).graph.node}
    feeds = random_feeds(artifact.manifest.io, SIZES, seed=1)
    assert relative_l2(run(model, feeds | fed), run_onnx(artifact.onnx_path, feeds)["out_sample"]) <= 1e-6


def test_half_precision_keeps_its_inputs_outputs_and_names(half_artifact: Artifact) -> None:
    model = whole(engine_graph(half_artifact.onnx_path), half_artifact)
    before = onnx.load(half_artifact.onnx_path)
    assert [v.name for v in model.graph.input] == [v.name for v in before.graph.input]
    assert list(model.graph.output) == list(before.graph.output)
    names = {initializer.name for initializer in before.graph.initializer}
    assert names <= {initializer.name for initializer in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    normalisations = [node for node in model.graph.node if node.op_type in NORMALISATIONS]
    assert normalisations
    for node in normalisations:
        assert {types[name] for name in [*node.input, *node.output] if name in types} == {TensorProto.FLOAT}
    feeds = random_feeds(half_artifact.manifest.io, half_artifact.manifest.io.fixed_sizes(), seed=1)
    error = relative_l2(run(model, feeds).float(), run_onnx(half_artifact.onnx_path, feeds)["out_sample"].float())
    assert error <= 2e-3  # the order of half precision's rounding


def reference(model: onnx.ModelProto, values: np.ndarray) -> np.ndarray:
    results = list(ReferenceEvaluator(model).run(None, {"x": values}))
    return np.asarray(results[0])


def test_a_normalisation_keeps_its_precision_where_half_would_overflow() -> None:
    """Squares of 300 leave half precision's range; ONNX's reference evaluator computes in the graph's own types."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 2, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 2, 8])
    weights = [helper.make_tensor(name, TensorProto.FLOAT16, [2], [value] * 2) for name, value in (("s", 1), ("b", 0))]
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], name="norm")
    graph = helper.make_graph([node], "g", [x], [y], weights)
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    wide = ir.serde.serialize_model(islands(ir.serde.deserialize_model(plain)))
    onnx.checker.check_model(wide, full_check=True)
    values = (np.arange(16).reshape(1, 2, 8) * 100).astype(np.float16)
    found = reference(wide, values)
    assert found.dtype == np.float16
    given = values.astype(np.float64)
    expected = (given - given.mean(-1, keepdims=True)) / np.sqrt(given.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=1e-3)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = reference(plain, values)
    assert not np.allclose(narrow.astype(np.float64), expected, atol=1e-3)


def attention_model(scale: float | None, is_causal: int = 0) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, n, 8])
        for name, n in zip("qkv", (5, 7, 7), strict=True)
    ]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention", is_causal=is_causal, scale=scale)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 5, 8])
    graph = helper.make_graph([node], "g", values, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_written_out(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    model = ir.serde.serialize_model(attention(ir.serde.deserialize_model(attention_model(scale))))
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {"Transpose", "Mul", "MatMul", "Softmax"}
    (found,) = ReferenceEvaluator(model).run(
        None, {name: t.float().numpy() for name, t in {"q": q, "k": k, "v": v}.items()}
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, atol=1e-5, rtol=1e-5)


def test_attention_that_means_something_else_is_refused() -> None:
    with pytest.raises(ExportError, match="attention"):
        attention(ir.serde.deserialize_model(attention_model(None, is_causal=1)))


def test_an_input_that_is_none_is_named(onnx_artifact: Artifact) -> None:
    model = ir.load(onnx_artifact.onnx_path)
    with pytest.raises(ExportError, match=r"conv_in\.weight"):
        required(model, ["conv_in.weight"])  # an initialiser, but no graph input


def test_the_artifact_is_left_alone(onnx_artifact: Artifact) -> None:
    before = {path: path.read_bytes() for path in Path(onnx_artifact.folder).rglob("*") if path.is_file()}
    engine_graph(onnx_artifact.onnx_path)
    assert before == {path: path.read_bytes() for path in Path(onnx_artifact.folder).rglob("*") if path.is_file()}
