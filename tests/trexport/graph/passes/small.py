"""Small graphs in ONNX's text form, rewritten by one pass and run before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import torch
from onnx import numpy_helper
from onnx_ir.passes.common import ShapeInferencePass
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
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

    def assert_same(self, tolerance: float = 1e-5, fed: Collection[str] = (), *, kernels: bool = False) -> None:
        """On random inputs the rewritten graph computes what ONNX Runtime computes for the one before.

        Args:
            fed: inputs that have a value and are given another.
            kernels: that ONNX Runtime, which has kernels for all operators on a CPU, computes the same for the one after.
        """
        self.assert_accepted()
        feeds = self.feeds(fed)
        expected = computed(self.before, feeds)
        assert [output.name for output in self.after.graph.output] == [o.name for o in self.before.graph.output]
        results = [[tensor.numpy() for tensor in evaluated(self.after, feeds)]]
        results += [computed(self.after, feeds)] if kernels else []
        for result in results:
            for found, wanted in zip(result, expected, strict=True):
                assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                np.testing.assert_allclose(
                    found.astype(np.float64), wanted.astype(np.float64), atol=tolerance, rtol=tolerance
                )

    def feeds(self, fed: Collection[str] = ()) -> dict[str, Tensor]:
        """Random inputs, free axes three long."""
        generator = torch.Generator().manual_seed(1)
        feeds: dict[str, Tensor] = {}
        weights = {tensor.name for tensor in self.before.graph.initializer} - set(fed)
        for value in self.before.graph.input:
            shape = [dim.dim_value or 3 for dim in value.type.tensor_type.shape.dim]
            dtype = torch.float16 if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 else torch.float32
            if value.name not in weights:
                feeds[value.name] = torch.randn(shape, generator=generator).to(dtype)
        return feeds

    def assert_accepted(self) -> None:
        """The rewritten graph has the types and shapes that it declares, and ONNX Runtime, which may lack a kernel on a CPU,
        takes its operators as they are."""
        onnx.checker.check_model(self.after, full_check=True)
        with contextlib.suppress(NoKernel):
            _session(self.after)

    def assert_untouched(self) -> None:
        assert self.sites == 0
        assert [n.op_type for n in self.before.graph.node] == self.ops()


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def computed(model: onnx.ModelProto, feeds: Mapping[str, Tensor]) -> list[np.ndarray]:
    """The outputs, by ONNX Runtime on a CPU."""
    results = _session(model).run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [np.asarray(result) for result in results]


Weights = Mapping[str, "tuple[int, ...] | np.ndarray"]
"""Initialisers by name: arrays as they are, or random ones of a shape."""


def rewrite(
    text: str,
    run: Run,
    weights: Weights | None = None,
    *,
    opset: int = 20,
    checked: bool = True,
    half: bool = False,
) -> Rewritten:
    """A graph by its text, without the header, after a pass.

    Args:
        checked: that the graph is valid.
        half: whether random weights are float16, not float32.
    """
    own = ', "com.microsoft": 1' if "com.microsoft." in text else ""
    before = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{own}]> g {text}')
    generator = np.random.default_rng(3)
    for name, given in (weights or {}).items():
        random = np.float16 if half else np.float32
        array = given if isinstance(given, np.ndarray) else generator.standard_normal(given).astype(random)
        before.graph.initializer.append(numpy_helper.from_array(array, name))
    if checked:
        onnx.checker.check_model(before, full_check=True)
    model = ir.serde.deserialize_model(before)
    ShapeInferencePass()(model)
    sites = run(model)
    return Rewritten(before, ir.serde.serialize_model(model), sites)


def attributes(node: onnx.NodeProto) -> Mapping[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
