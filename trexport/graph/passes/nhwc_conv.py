"""Convolutions into ONNX Runtime's `NhwcConv`, channels last, the layout that tensor cores want."""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, is_op, op, replace
from trexport.graph.passes.transposes import TO_FIRST, TO_LAST


def nhwc_conv(model: ir.Model) -> int:
    """Replace every `Conv` of two dimensions that has a bias by `com.microsoft.NhwcConv` between two transposes, its weight
    transposed to (M, kH, kW, C / group); in place. Returns how many.

    The weight's transpose is a node on the unchanged initialiser: ONNX Runtime folds it when it loads the graph. The bias
    must be a constant: from one that it packs ahead, ONNX Runtime's kernel learns that the weight has its channels last.
    """
    sites = 0
    for node in list(model.graph):
        if not is_op(node, "Conv") or len(node.inputs) != 3:
            continue
        x, weight, bias = node.inputs
        y = node.outputs[0]
        sizes, kernel, result = dims(x), dims(weight), dims(y)
        if x is None or weight is None or bias is None or sizes is None or kernel is None or result is None:
            continue
        if len(kernel) != 4 or not bias.is_initializer() or bias.is_graph_input():
            continue
        attributes: dict[str, object] = dict(node.attributes)
        last = op("Transpose", [x], {"perm": TO_LAST}, like=x, shape=[sizes[axis] for axis in TO_LAST])
        turned = op("Transpose", [weight], {"perm": TO_LAST}, like=weight, shape=[kernel[axis] for axis in TO_LAST])
        inputs = [last.outputs[0], turned.outputs[0], bias]
        conv = op("NhwcConv", inputs, attributes, like=y, domain=MICROSOFT, shape=[result[axis] for axis in TO_LAST])
        back = op("Transpose", conv.outputs, {"perm": TO_FIRST}, like=conv.outputs[0], shape=result)
        for made in (last, turned, back):
            made.metadata_props.update(node.metadata_props)
        replace(model.graph, y, [last, turned, conv, back])
        sites += 1
    return finish(model, sites)
