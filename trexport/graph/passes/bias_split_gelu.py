"""The gate of a transformer's feed-forward layer, with its bias, into ONNX Runtime's `BiasSplitGelu`."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, integers, is_op, linear_bias, only_user, op, replace

WIDTHS = (1280, 2560, 5120)
"""What the CUDA kernel is compiled for: the width of the result."""


def bias_split_gelu(model: ir.Model, widths: Collection[int] = WIDTHS) -> int:
    """Replace `a · gelu(b)` of `[a, b] = x + bias`, halves of the last of three axes, by `com.microsoft.BiasSplitGelu`; in
    place. Returns how many. Other widths than `widths` are left alone, and gelu by its approximations."""
    sites = 0
    for node in list(model.graph):
        if not is_op(node, "Split") or len(node.outputs) != 2:
            continue
        sizes = dims(node.inputs[0])
        biased = linear_bias(node.inputs[0])
        gate = _gated(node)
        if sizes is None or biased is None or gate is None or len(sizes) != 3:
            continue
        width = sizes[2]
        if node.attributes.get_int("axis", 0) not in (-1, 2) or not isinstance(width, int) or width // 2 not in widths:
            continue
        halves = integers(node.inputs[1]) if len(node.inputs) > 1 else [width // 2, width // 2]
        if halves != [width // 2, width // 2]:
            continue
        replace(model.graph, gate, [op("BiasSplitGelu", list(biased), like=gate, domain=MICROSOFT)])
        sites += 1
    return finish(model, sites)


def _gated(node: ir.Node) -> ir.Value | None:
    """The first half times the exact gelu of the second, and no other readers of either."""
    left, right = node.outputs
    gelu, product = only_user(right), only_user(left)
    if gelu is None or product is None or not is_op(gelu, "Gelu") or not is_op(product, "Mul"):
        return None
    exact = gelu.attributes.get_string("approximate", "none") == "none"
    if not exact or only_user(gelu.outputs[0]) is not product:
        return None
    return product.outputs[0]
