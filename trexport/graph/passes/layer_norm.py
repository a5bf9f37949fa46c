"""Layer normalisations without a sum before them into ONNX Runtime's `SkipLayerNormalization` as well, of zeros: its kernel
is faster than that of `LayerNormalization`, and adds the bias of the product before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trexport.graph.matching import biased, dims, finish, is_op, new_constant, op
from trexport.graph.passes.skip_layer_norm import fuse


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
        model.graph.insert_before(node, zeros)
        found = biased(x)
        if found is None:
            fuse(model.graph, node, [x, zeros.outputs[0], gamma, beta])
        else:
            fuse(model.graph, node, [found[0], zeros.outputs[0], gamma, beta, found[1]], x)
        sites += 1
    return finish(model, sites)


def _zeros(graph: ir.Graph, like: ir.Value, shape: list[int]) -> ir.Node:
    """(tokens, width) of zeros, which ONNX Runtime makes when it loads the graph."""
    sizes = new_constant(graph, np.array(shape, dtype=np.int64), f"shape_{'x'.join(map(str, shape))}")
    assert like.dtype is not None
    value = ir.tensor(np.zeros(1, dtype=like.dtype.numpy()), name="zero")
    return op("ConstantOfShape", [sizes], {"value": value}, like=like, shape=shape)
