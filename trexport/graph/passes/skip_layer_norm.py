"""A sum and the layer normalisation of it into ONNX Runtime's `SkipLayerNormalization`, with the bias of what is summed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, is_op, linear_bias, made_by, op, replace


def skip_layer_norm(model: ir.Model) -> int:
    """Replace `Add` and `LayerNormalization` of (batch, tokens, width) by `com.microsoft.SkipLayerNormalization`, which adds
    the bias of a linear layer before it too, and gives the sum out where others read it; in place. Returns how many."""
    sites = 0
    for node in list(model.graph):
        if not is_op(node, "LayerNormalization") or len(node.inputs) != 3 or len(node.outputs) != 1:
            continue
        x, gamma, beta = node.inputs
        add = made_by(x, "Add")
        sizes = dims(x)
        if add is None or x is None or sizes is None or len(sizes) != 3 or x.is_graph_output():
            continue
        left, right = add.inputs
        if node.attributes.get_int("axis", -1) not in (-1, 2) or left is None or right is None:
            continue
        if dims(left) != sizes or dims(right) != sizes or not dims(gamma) == dims(beta) == sizes[2:]:
            continue
        taken = next(
            ((found, other) for one, other in ((left, right), (right, left)) if (found := linear_bias(one))), None
        )
        product, bias, skip = (left, None, right) if taken is None else (*taken[0], taken[1])
        inputs = [product, skip, gamma, beta, *([] if bias is None else [bias])]
        fuse(model.graph, node, inputs, x)
        sites += 1
    return finish(model, sites)


def fuse(graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], total: ir.Value | None = None) -> None:
    """Put `com.microsoft.SkipLayerNormalization` in the place of a `LayerNormalization`.

    Args:
        total: the sum that is normalised, given out where others read it.
    """
    y = node.outputs[0]
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    fused = op("SkipLayerNormalization", inputs, {"epsilon": epsilon}, like=y, domain=MICROSOFT)
    readers = 0 if total is None else len(total.uses())
    if readers > 1:
        fused.resize_outputs(4)
        mean, deviation, given = fused.outputs[1:]
        mean.name = deviation.name = ""  # of training
        assert total is not None
        given.type, given.shape = total.type, total.shape
    replace(graph, y, [fused], fused.outputs[0])
    if readers > 1 and total is not None:
        total.replace_all_uses_with(fused.outputs[3])
