"""Layer normalisations without a sum before them into ONNX Runtime's `SkipLayerNormalization` as well, of zeros: its kernel
is faster than that of `LayerNormalization`, and adds the bias of the product before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, is_op, made_by, new_constant, op, replace


def layer_norm(model: ir.Model) -> int:
    """Replace `LayerNormalization` of (batch, tokens, width), tokens and width fixed, with the sum of a row before it, by
    `com.microsoft.SkipLayerNormalization`; in place. Returns how many."""
    sites = 0
    for node in list(model.graph):
        if not is_op(node, "LayerNormalization") or len(node.inputs) != 3 or len(node.outputs) != 1:
            continue
        x, gamma, beta = node.inputs
        sizes = dims(x)
        if x is None or x.dtype is None or sizes is None or len(sizes) != 3 or x.is_graph_output():
            continue
        if node.attributes.get_int("axis", -1) not in (-1, 2) or not all(isinstance(size, int) for size in sizes[1:]):
            continue
        if not dims(gamma) == dims(beta) == sizes[2:]:
            continue
        zeros = _zeros(model.graph, x, [int(size) for size in sizes[1:]])
        biased = _biased(x)
        inputs = (
            [x, zeros.outputs[0], gamma, beta]
            if biased is None
            else [biased[0], zeros.outputs[0], gamma, beta, biased[1]]
        )
        y = node.outputs[0]
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        fused = op("SkipLayerNormalization", inputs, {"epsilon": epsilon}, like=y, domain=MICROSOFT)
        if biased is not None and len(x.uses()) > 1:
            fused.resize_outputs(4)
            mean, deviation, total = fused.outputs[1:]
            mean.name = deviation.name = ""  # of training
            total.type, total.shape = x.type, x.shape
            replace(model.graph, y, [zeros, fused], fused.outputs[0])
            x.replace_all_uses_with(total)
        else:
            replace(model.graph, y, [zeros, fused])
        sites += 1
    return finish(model, sites)


def _biased(x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What a row is added to, and the row."""
    add = made_by(x, "Add")
    for bias, product in () if add is None else (add.inputs, add.inputs[::-1]):
        if bias is None or product is None or not bias.is_initializer():
            continue
        if dims(product) == dims(x) and dims(bias) == (dims(x) or [])[-1:]:
            return product, bias
    return None


def _zeros(graph: ir.Graph, like: ir.Value, shape: list[int]) -> ir.Node:
    """(tokens, width) of zeros, which ONNX Runtime makes when it loads the graph."""
    sizes = new_constant(graph, np.array(shape, dtype=np.int64), f"shape_{'x'.join(map(str, shape))}")
    assert like.dtype is not None
    value = ir.tensor(np.zeros(1, dtype=like.dtype.numpy()), name="zero")
    return op("ConstantOfShape", [sizes], {"value": value}, like=like, shape=shape)
