"""A sum and the group normalisation of it into ONNX Runtime's `SkipGroupNorm`: the sum is read once instead of twice.

Biases of what is added go in too. A convolution without one runs in cuDNN's finished kernels; with one, where it is not a
kernel of its own, in one that is generated for it and was measured to be slower.
"""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.matching import (
    MICROSOFT,
    dims,
    finish,
    integers,
    is_constant,
    is_op,
    linear_bias,
    made_by,
    only_user,
    op,
    replace,
)


def skip_group_norm(model: ir.Model) -> int:
    """Replace `Add` and `com.microsoft.GroupNorm` by `com.microsoft.SkipGroupNorm`, which adds the bias of a product or a
    convolution before it too, and gives the sum out where others read it; in place. Returns how many. Residuals of the same
    shape, and rows (N, C) for whole images, a time embedding for instance, which it takes as they are.

    Of two biases the sum goes in, a node on initialisers, which ONNX Runtime folds when it loads the graph.
    """
    sites = 0
    for node in list(model.graph):
        if not is_op(node, "GroupNorm", MICROSOFT):
            continue
        x, gamma, beta = node.inputs
        add = made_by(x, "Add")
        if add is None or x is None or x.is_graph_output():
            continue
        parts = parts_of(add)
        if parts is None:
            continue
        image, skip = parts
        y = node.outputs[0]
        bias: ir.Value | None = None
        first: list[ir.Node] = []
        image, bias = _apart(model.graph, image, bias, first)
        if dims(skip) == dims(image):
            skip, bias = _apart(model.graph, skip, bias, first)
        inputs = [image, gamma, beta, skip] if bias is None else [image, gamma, beta, skip, bias]
        fused = op("SkipGroupNorm", inputs, dict(node.attributes), like=y, domain=MICROSOFT)
        if len(x.uses()) > 1:
            fused.resize_outputs(2)
            total = fused.outputs[1]
            total.type, total.shape = x.type, x.shape
            replace(model.graph, y, [*first, fused], fused.outputs[0])
            x.replace_all_uses_with(total)
        else:
            replace(model.graph, y, [*first, fused])
        sites += 1
    return finish(model, sites)


def parts_of(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """What is added to, and what is added: of the same shape, or a row for a whole image."""
    whole = dims(add.outputs[0])
    for image, skip in (add.inputs, add.inputs[::-1]):
        if image is None or skip is None or whole is None or dims(image) != whole:
            continue
        if dims(skip) == whole:
            return image, skip
        row = made_by(skip, "Unsqueeze")
        if row is not None and integers(row.inputs[1]) == [1, 2] and dims(row.inputs[0]) == [whole[0], whole[3]]:
            assert row.inputs[0] is not None
            return image, row.inputs[0]
    return None


def _apart(
    graph: ir.Graph, value: ir.Value, bias: ir.Value | None, first: list[ir.Node]
) -> tuple[ir.Value, ir.Value | None]:
    """A value without the bias of what computes it, and that bias, with another one's added to it, by a node that is put
    into `first`; both as they are where that cannot be."""
    found = linear_bias(value)
    conv = None if found is not None else _biased_convolution(value)
    own = found[1] if found is not None else conv.inputs[2] if conv is not None else None
    if own is None or (bias is not None and not (is_constant(own) and is_constant(bias))):
        return value, bias
    if bias is not None:
        first.append(op("Add", [bias, own], like=value, shape=dims(own)))
        own = first[-1].outputs[0]
    if found is not None:
        return found[0], own
    assert conv is not None
    plain = op("NhwcConv", conv.inputs[:2], dict(conv.attributes), like=value, domain=MICROSOFT)
    replace(graph, value, [plain])
    return plain.outputs[0], own


def _biased_convolution(value: ir.Value) -> ir.Node | None:
    """With no other reader."""
    conv = made_by(value, "NhwcConv", MICROSOFT)
    return None if conv is None or only_user(value) is None or len(conv.inputs) != 3 else conv
