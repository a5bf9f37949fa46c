"""A sum and the group normalisation of it into ONNX Runtime's `SkipGroupNorm`: the sum is read once instead of twice."""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, integers, is_op, linear_bias, made_by, op, replace


def skip_group_norm(model: ir.Model) -> int:
    """Replace `Add` and `com.microsoft.GroupNorm` by `com.microsoft.SkipGroupNorm`, which adds the bias of a product before
    it too, and gives the sum out where others read it; in place. Returns how many. Residuals of the same shape, and rows
    (N, C) for whole images, a time embedding for instance, which it takes as they are.
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
        inputs = [image, gamma, beta, skip]
        if (biased := linear_bias(image)) is not None:
            inputs = [biased[0], gamma, beta, skip, biased[1]]
        elif (biased := linear_bias(skip)) is not None and dims(skip) == dims(image):
            inputs = [image, gamma, beta, biased[0], biased[1]]
        y = node.outputs[0]
        fused = op("SkipGroupNorm", inputs, dict(node.attributes), like=y, domain=MICROSOFT)
        if len(x.uses()) > 1:
            fused.resize_outputs(2)
            total = fused.outputs[1]
            total.type, total.shape = x.type, x.shape
            replace(model.graph, y, [fused], fused.outputs[0])
            x.replace_all_uses_with(total)
        else:
            replace(model.graph, y, [fused])
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
