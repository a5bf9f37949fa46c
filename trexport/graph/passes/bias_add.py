"""The bias of a linear layer and the residual after it in one go: ONNX Runtime's `BiasAdd`."""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, is_op, linear_bias, op, replace


def bias_add(model: ir.Model) -> int:
    """Replace `(x + bias) + skip` of (batch, tokens, width) by `com.microsoft.BiasAdd`; in place. Returns how many."""
    sites = 0
    for node in list(model.graph):
        sizes = dims(node.outputs[0])
        if not is_op(node, "Add") or sizes is None or len(sizes) != 3:
            continue
        for one, skip in (node.inputs, node.inputs[::-1]):
            biased = linear_bias(one)
            if biased is None or dims(skip) != sizes or dims(biased[0]) != sizes:
                continue
            y = node.outputs[0]
            replace(model.graph, y, [op("BiasAdd", [*biased, skip], like=y, domain=MICROSOFT)])
            sites += 1
            break
    return finish(model, sites)
