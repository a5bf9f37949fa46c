import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from trexport.graph.passes.fold import fold

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def model() -> ir.Model:
    """x·Wᵀ + zeros, reshaped to a shape that is computed from constants; W twice, under two names."""
    constants = {"a.weight": W, "b.weight": W, "bias": np.zeros(3, np.float32), "two": np.array([2], np.int64)}
    nodes = [
        helper.make_node("Transpose", ["a.weight"], ["at"]),
        helper.make_node("Transpose", ["b.weight"], ["bt"]),
        helper.make_node("MatMul", ["x", "at"], ["xa"]),
        helper.make_node("MatMul", ["x", "bt"], ["xb"]),
        helper.make_node("Add", ["xa", "bias"], ["xab"]),
        helper.make_node("Add", ["xab", "xb"], ["sum"]),
        helper.make_node("Mul", ["two", "two"], ["four"]),
        helper.make_node("Concat", ["four", "minus"], ["shape"], axis=0),
        helper.make_node("Reshape", ["sum", "shape"], ["y"]),
        helper.make_node("Sqrt", ["x"], ["unused"]),
    ]
    constants["minus"] = np.array([-1], np.int64)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 6])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_constants_are_folded_and_parameters_are_not() -> None:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    (before,) = ReferenceEvaluator(ir.to_proto(model())).run(None, {"x": x})
    folded = fold(model(), {"a.weight", "b.weight", "bias"})
    proto = ir.to_proto(folded)
    (after,) = ReferenceEvaluator(proto).run(None, {"x": x})
    assert np.array_equal(before, after)
    held = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    assert np.array_equal(held["a.weight"], W)
    assert np.array_equal(held["b.weight"], W)  # equal parameters are not merged
    assert np.array_equal(held["bias"], np.zeros(3))  # nor is a bias of zeros dropped
    operators = [node.op_type for node in proto.graph.node]
    assert operators.count("Transpose") == 2
    assert not {"Mul", "Concat", "Sqrt"} & set(operators)
