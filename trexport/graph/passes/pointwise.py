"""1×1 convolutions of images with channels last as products, where what comes next takes their bias along."""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.matching import (
    MICROSOFT,
    dims,
    finish,
    is_op,
    made_by,
    only_user,
    op,
    permutation,
    replace,
)
from trexport.graph.passes.nhwc_conv import is_pointwise, product
from trexport.graph.passes.skip_group_norm import parts_of
from trexport.graph.passes.transposes import TO_LAST


def pointwise(model: ir.Model) -> int:
    """Replace `com.microsoft.NhwcConv` of one pixel by `MatMul` and `Add`, where the sum goes into a residual that is
    normalised (`skip_group_norm` takes the bias), or as tokens into a `LayerNormalization` (`layer_norm` does); in place.
    Returns how many. Elsewhere a bias would be a kernel of its own."""
    sites = 0
    for node in list(model.graph):
        if not is_op(node, "NhwcConv", MICROSOFT) or not is_pointwise(node, (dims(node.inputs[1]) or [])[1:3]):
            continue
        y = node.outputs[0]
        user = only_user(y)
        weight = made_by(node.inputs[1], "Transpose")
        if user is None or weight is None or permutation(weight) != TO_LAST:
            continue
        if is_op(user, "Reshape") and _is_normalised_as_tokens(y, user.outputs[0]):
            tokens = user.outputs[0]
            multiplied = product(model.graph, node, node.inputs[0], weight.inputs[0])
            view = op("Reshape", [multiplied[-1].outputs[0], user.inputs[1]], like=y, shape=dims(tokens))
            biased = op("Add", [view.outputs[0], node.inputs[2]], like=y, shape=dims(tokens))
            replace(model.graph, tokens, [*multiplied, view, biased])
        elif is_op(user, "Add") and _is_normalised_as_image(user):
            multiplied = product(model.graph, node, node.inputs[0], weight.inputs[0])
            biased = op("Add", [multiplied[-1].outputs[0], node.inputs[2]], like=y)
            replace(model.graph, y, [*multiplied, biased])
        else:
            continue
        sites += 1
    return finish(model, sites)


def _is_normalised_as_tokens(image: ir.Value, value: ir.Value) -> bool:
    """Each pixel a token, of a fixed number."""
    sizes, channels = dims(value), (dims(image) or [None])[-1]
    fixed = sizes is not None and len(sizes) == 3 and isinstance(sizes[1], int) and sizes[2] == channels
    return fixed and any(is_op(use.node, "LayerNormalization") for use in value.uses())


def _is_normalised_as_image(add: ir.Node) -> bool:
    total = add.outputs[0]
    users = [use.node for use in total.uses()]
    norms = [node for node in users if is_op(node, "GroupNorm", MICROSOFT) and node.inputs[0] is total]
    return bool(norms) and not total.is_graph_output() and parts_of(add) is not None
