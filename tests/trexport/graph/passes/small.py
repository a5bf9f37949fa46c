"""Small graphs in ONNX's text form, rewritten by one pass and run before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import torch
from onnx import numpy_helper
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor

from tests.trexport.contrib import evaluated

Run = Callable[[ir.Model], int]


@dataclass(frozen=True)
class Rewritten:
    """A graph before and after a pass."""

    before: onnx.ModelProto
    after: onnx.ModelProto
    sites: int
    """As the pass counts them."""

    def ops(self) -> list[str]:
        """The operators after it, in order."""
        return [node.op_type for node in self.after.graph.node]

    def node(self, op_type: str) -> onnx.NodeProto:
        (found,) = [node for node in self.after.graph.node if node.op_type == op_type]
        return found

    def assert_same(self, tolerance: float = 1e-5) -> None:
        """On random inputs the rewritten graph computes what ONNX Runtime computes for the one before."""
        generator = torch.Generator().manual_seed(1)
        feeds: dict[str, Tensor] = {}
        weights = {tensor.name for tensor in self.before.graph.initializer}
        for value in self.before.graph.input:
            shape = [dim.dim_value or 3 for dim in value.type.tensor_type.shape.dim]
            dtype = torch.float16 if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 else torch.float32
            if value.name not in weights:
                feeds[value.name] = torch.randn(shape, generator=generator).to(dtype)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(self.before.SerializeToString(), options)
        names = [output.name for output in self.before.graph.output]
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        expected = [np.asarray(value) for value in session.run(names, arrays)]
        assert [output.name for output in self.after.graph.output] == names
        for tensor, wanted in zip(evaluated(self.after, feeds), expected, strict=True):
            found = tensor.numpy()
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(
                found.astype(np.float64), wanted.astype(np.float64), atol=tolerance, rtol=tolerance
            )

    def assert_untouched(self) -> None:
        assert self.sites == 0
        assert [n.op_type for n in self.before.graph.node] == self.ops()


Weights = Mapping[str, "tuple[int, ...] | np.ndarray"]
"""Initialisers by name: arrays as they are, or random float32 ones of a shape."""


def rewrite(text: str, run: Run, weights: Weights | None = None, *, opset: int = 20, checked: bool = True) -> Rewritten:
    """A graph by its text, without the header, after a pass.

    Args:
        checked: that the graph is valid.
    """
    before = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
    generator = np.random.default_rng(3)
    for name, given in (weights or {}).items():
        array = given if isinstance(given, np.ndarray) else generator.standard_normal(given).astype(np.float32)
        before.graph.initializer.append(numpy_helper.from_array(array, name))
    if checked:
        onnx.checker.check_model(before, full_check=True)
    model = ir.serde.deserialize_model(before)
    ShapeInferencePass()(model)
    sites = run(model)
    return Rewritten(before, ir.serde.serialize_model(model), sites)


def attributes(node: onnx.NodeProto) -> Mapping[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
