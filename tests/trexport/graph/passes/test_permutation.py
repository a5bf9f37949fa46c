from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from trexport.graph.passes.permutation import permutation


def einsum(equation: str, shape: tuple[int, ...]) -> ir.Model:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
    y = ir.val("y", dtype=ir.DataType.FLOAT)
    node = ir.node("Einsum", [x], {"equation": equation}, outputs=[y], name="e")
    return ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 18}, name="g"), ir_version=10)


@pytest.mark.parametrize(
    ("equation", "shape", "op"),
    [
        ("nhwpqc->nchpwq", (2, 3, 4, 5, 6, 7), "Transpose"),
        ("ab -> ba", (2, 3), "Transpose"),
        ("ab->a", (2, 3), "Einsum"),
        ("aa->a", (3, 3), "Einsum"),
        ("ab", (2, 3), "Einsum"),
    ],
)
def test_what_reorders_axes_is_a_transpose(equation: str, shape: tuple[int, ...], op: str) -> None:
    model = permutation(einsum(equation, shape))
    (node,) = model.graph
    assert (node.op_type, node.name, node.outputs[0].name) == (op, "e", "y")
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = np.asarray(session.run(None, {"x": x})[0])
    assert np.allclose(found, np.einsum(equation.replace(" ", ""), x))
