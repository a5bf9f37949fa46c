"""`Attention` into products and a softmax: TensorRT-RTX takes the operator only where it has a dedicated kernel for the
precision and the heads, and fuses the plain form itself where it has one."""

from __future__ import annotations

import math

import onnx_ir as ir

from trexport.errors import ExportError

_TAKEN = {"scale", "is_causal", "softcap", "qk_matmul_output_mode", "softmax_precision", "q_num_heads", "kv_num_heads"}


def attention(model: ir.Model) -> ir.Model:
    """Replace each `Attention` of four-dimensional inputs (batch, heads, tokens, width) without mask or cache by
    `softmax(√s·Q · (√s·K)ᵀ) · V`; in place. Both factors are scaled, as torch and ONNX's own function do: the product stays
    in the range of half precision.

    Raises:
        ExportError: a mask, a cache, a soft cap, or inputs of three dimensions.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        query, key, value = _plain_inputs(node)
        assert query.shape is not None
        width = query.shape[-1]
        scale = node.attributes.get_float("scale", 0.0)
        if not scale:
            if not isinstance(width, int):
                raise ExportError(f"{node.name}: heads of unknown width; export again with trexport")
            scale = 1 / math.sqrt(width)
        root = ir.Value(
            name=f"{node.name}.scale",
            shape=ir.Shape([]),
            type=query.type,
            const_value=_scalar(math.sqrt(scale), query.dtype, f"{node.name}.scale"),
        )
        graph.register_initializer(root)
        turned = ir.node("Transpose", [key], {"perm": [0, 1, 3, 2]}, name=f"{node.name}.key")
        left = ir.node("Mul", [query, root], name=f"{node.name}.query")
        right = ir.node("Mul", [turned.outputs[0], root], name=f"{node.name}.scaled_key")
        scores = ir.node("MatMul", [left.outputs[0], right.outputs[0]], name=f"{node.name}.scores")
        weights = ir.node("Softmax", [scores.outputs[0]], {"axis": -1}, name=f"{node.name}.softmax")
        result = ir.node("MatMul", [weights.outputs[0], value], name=f"{node.name}.values")
        output, old = result.outputs[0], node.outputs[0]
        output.shape, output.type = old.shape, old.type
        name = old.name
        graph.insert_before(node, [turned, left, right, scores, weights, result])
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        output.name = name
    return model


def _plain_inputs(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    query, key, value, *others = [*node.inputs]
    given = [value for value in others if value is not None]
    attributes = node.attributes
    unknown = set(attributes) - _TAKEN
    special = attributes.get_int("is_causal", 0) or attributes.get_float("softcap", 0.0) or unknown
    four = query is not None and query.shape is not None and len(query.shape) == 4
    if given or special or not four or query is None or key is None or value is None or len(node.outputs) != 1:
        raise ExportError(
            f"{node.name}: an Attention with a mask, a cache, a soft cap or flat heads cannot be written out"
        )
    return query, key, value


def _scalar(value: float, dtype: ir.DataType | None, name: str) -> ir.TensorProtocol:
    import numpy as np

    assert dtype is not None
    return ir.Tensor(np.array(value, dtype=dtype.numpy()), dtype=dtype, name=name)
