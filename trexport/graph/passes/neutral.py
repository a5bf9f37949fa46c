"""Products with one and quotients by one, which diffusers' rescaling leaves behind and which part what belongs together."""

from __future__ import annotations

import onnx_ir as ir

from trexport.graph.matching import dims, finish, is_op, number


def neutral(model: ir.Model) -> int:
    """Drop `x / 1`, `x · 1` and `1 · x` with a constant one that does not widen x; in place. Returns how many."""
    sites = 0
    for node in list(model.graph):
        for one, other in _operands(node):
            if other is None or one is None or number(one) != 1.0 or not _is_no_wider(one, other):
                continue
            if node.outputs[0].is_graph_output():
                continue
            node.outputs[0].replace_all_uses_with(other)
            sites += 1
            break
    return finish(model, sites)


def _operands(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    if is_op(node, "Div"):
        return [(node.inputs[1], node.inputs[0])]
    return [(node.inputs[1], node.inputs[0]), (node.inputs[0], node.inputs[1])] if is_op(node, "Mul") else []


def _is_no_wider(one: ir.Value, other: ir.Value) -> bool:
    rank, sizes = dims(one), dims(other)
    return rank == [] or (rank is not None and sizes is not None and len(rank) <= len(sizes))
