"""Convolutions into ONNX Runtime's `NhwcConv`, channels last, the layout that tensor cores want."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, is_constant, is_op, new_constant, op, replace
from trexport.graph.passes.transposes import TO_FIRST, TO_LAST


def nhwc_conv(model: ir.Model) -> int:
    """Replace every `Conv` of two dimensions whose weight and bias are constants by `com.microsoft.NhwcConv` between two
    transposes, its weight transposed to (M, kH, kW, C / group); in place. Returns how many.

    The weight's transpose is a node on the unchanged initialiser: ONNX Runtime folds it when it loads the graph. Its CUDA
    provider does not take the operator with a weight that is fed or computed: of those, the convolutions of one pixel become
    `MatMul` and `Add`, others stay. The bias must be a constant: from one that it packs ahead, ONNX Runtime's kernel learns
    that the weight has its channels last.
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
        if len(kernel) != 4 or not is_constant(bias):
            continue
        if not is_constant(weight) and not is_pointwise(node, kernel[2:]):
            continue
        last = op("Transpose", [x], {"perm": TO_LAST}, like=x, shape=[sizes[axis] for axis in TO_LAST])
        shape = [result[axis] for axis in TO_LAST]
        if is_constant(weight):
            turned = op("Transpose", [weight], {"perm": TO_LAST}, like=weight, shape=[kernel[axis] for axis in TO_LAST])
            attributes: dict[str, object] = dict(node.attributes)
            inputs = [last.outputs[0], turned.outputs[0], bias]
            made = [turned, op("NhwcConv", inputs, attributes, like=y, domain=MICROSOFT, shape=shape)]
        else:
            made = product(model.graph, node, last.outputs[0], weight, shape)
            made.append(op("Add", [made[-1].outputs[0], bias], like=y, shape=shape))
        back = op("Transpose", made[-1].outputs, {"perm": TO_FIRST}, like=made[-1].outputs[0], shape=result)
        made = [last, *made, back]
        for one in made:
            one.metadata_props.update(node.metadata_props)
        replace(model.graph, y, made)
        sites += 1
    return finish(model, sites)


def is_pointwise(node: ir.Node, kernel: Sequence[int | str]) -> bool:
    """Whether a convolution with a bias is a product at every pixel.

    Args:
        kernel: its height and width.
    """
    attributes = node.attributes
    return (
        len(node.inputs) == 3
        and list(kernel) == [1, 1]
        and attributes.get_int("group", 1) == 1
        and not any(attributes.get_ints("pads", [0]))
        and set(attributes.get_ints("strides", [1])) == {1}
    )


def product(
    graph: ir.Graph,
    node: ir.Node,
    x: ir.Value | None,
    weight: ir.Value | None,
    shape: Sequence[int | str] | None = None,
) -> list[ir.Node]:
    """What takes the place of a convolution of one pixel but its bias: (N, H, W, C) · (C, M).

    Args:
        x: (N, H, W, C).
        weight: (M, C, 1, 1).
        shape: of the result, where it is not the convolution's.
    """
    assert weight is not None
    rows, columns = (dims(weight) or [])[:2]
    axes = new_constant(graph, np.array([2, 3], dtype=np.int64), "kernel_axes")
    matrix = op("Squeeze", [weight, axes], like=weight, shape=[rows, columns])
    turned = op("Transpose", matrix.outputs, {"perm": [1, 0]}, like=weight, shape=[columns, rows])
    multiplied = op("MatMul", [x, turned.outputs[0]], like=node.outputs[0], shape=shape)
    multiplied.metadata_props.update(node.metadata_props)
    return [matrix, turned, multiplied]
