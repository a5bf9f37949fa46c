"""Transposes between the layouts of images moved down the graph until they meet and vanish."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from trexport.graph.matching import (
    constant,
    dims,
    finish,
    integers,
    is_op,
    made_by,
    new_constant,
    number,
    op,
    permutation,
    replace,
)

TO_LAST = [0, 2, 3, 1]
TO_FIRST = [0, 3, 1, 2]


def transposes(model: ir.Model) -> int:
    """Let what only passes an image through, sums, products, concatenations and resizing, do so with channels last where its
    inputs have them last, and drop pairs of transposes that undo each other; in place. Returns how many transposes of images
    are gone.

    One way through the graph, in its order: each such node takes the transposes in front of it behind it, down to the next
    convolution, normalisation or row of tokens, where they end.
    """
    before = _count(model)
    sites = 0
    for node in list(model.graph):
        if permutation(node) in (TO_LAST, TO_FIRST):
            sites += _dropped(node)
        elif (rule := _RULES.get(node.op_type)) is not None and is_op(node, node.op_type):
            sites += _moved(model, node, rule)
    finish(model, sites)
    return before - _count(model)


def _count(model: ir.Model) -> int:
    return sum(permutation(node) in (TO_LAST, TO_FIRST) and not _is_weight(node) for node in model.graph)


def _is_weight(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].is_initializer()


def _dropped(node: ir.Node) -> bool:
    """Whether a transpose undoes the one before it, and its readers now take what that one has."""
    other = made_by(node.inputs[0], "Transpose")
    found = permutation(other)
    if other is None or found is None or other.inputs[0] is None or node.outputs[0].is_graph_output():
        return False
    if sorted((found, permutation(node) or [])) != [TO_LAST, TO_FIRST]:
        return False
    node.outputs[0].replace_all_uses_with(other.inputs[0])
    return True


_Rule = Callable[[ir.Graph, ir.Node], "tuple[list[ir.Value | None], dict[str, object]] | None"]


def _moved(model: ir.Model, node: ir.Node, rule: _Rule) -> bool:
    sizes = dims(node.outputs[0])
    if len(node.outputs) != 1 or sizes is None or len(sizes) != 4 or all(_last(value) is None for value in node.inputs):
        return False
    found = rule(model.graph, node)
    if found is None:
        return False
    inputs, changed = found
    old = node.outputs[0]
    attributes: dict[str, object] = {**node.attributes, **changed}
    moved = op(node.op_type, inputs, attributes, like=old, shape=[sizes[axis] for axis in TO_LAST])
    back = op("Transpose", moved.outputs, {"perm": TO_FIRST}, like=moved.outputs[0], shape=sizes)
    back.metadata_props.update(node.metadata_props)
    replace(model.graph, old, [moved, back])
    return True


def _last(value: ir.Value | None) -> ir.Value | None:
    """The same image with its channels last, where it is at hand."""
    turn = made_by(value, "Transpose")
    return turn.inputs[0] if turn is not None and permutation(turn) == TO_FIRST else None


def _elementwise(graph: ir.Graph, node: ir.Node) -> tuple[list[ir.Value | None], dict[str, object]] | None:
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        image = _last(value)
        if image is None and number(value) is not None and len(dims(value) or []) < 2:
            image = value
        if image is None and (row := _per_channel(graph, value)) is not None:
            image = row
        if image is None:
            return None
        inputs.append(image)
    return inputs, {}


def _per_channel(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    """(N, 1, 1, C) for the (N, C, 1, 1) that is made of (N, C)."""
    node = made_by(value, "Unsqueeze")
    if node is None or integers(node.inputs[1]) != [2, 3]:
        return None
    sizes = dims(node.inputs[0])
    if sizes is None or len(sizes) != 2:
        return None
    axes = new_constant(graph, np.array([1, 2], dtype=np.int64), "image_axes")
    row = op("Unsqueeze", [node.inputs[0], axes], like=node.outputs[0], shape=[sizes[0], 1, 1, sizes[1]])
    graph.insert_before(node, row)
    return row.outputs[0]


def _concat(graph: ir.Graph, node: ir.Node) -> tuple[list[ir.Value | None], dict[str, object]] | None:
    inputs = [_last(value) for value in node.inputs]
    axis = node.attributes["axis"].as_int()
    return None if None in inputs else (inputs, {"axis": TO_LAST.index(axis % 4)})


def _resize(graph: ir.Graph, node: ir.Node) -> tuple[list[ir.Value | None], dict[str, object]] | None:
    """Of one scale, or size, for each axis, as a constant."""
    x, roi, *given = node.inputs
    if "axes" in node.attributes or (roi is not None and roi.shape is not None and roi.shape != [0]):
        return None
    rearranged: list[ir.Value | None] = []
    for value in given:
        elements = constant(value)
        if value is not None and (elements is None or elements.shape != (4,)):
            return None
        rearranged.append(None if elements is None else new_constant(graph, elements[TO_LAST], f"{value.name}.last"))  # type: ignore[union-attr]
    return [_last(x), None, *rearranged], {}


_RULES: dict[str, _Rule] = {
    "Add": _elementwise,
    "Sub": _elementwise,
    "Mul": _elementwise,
    "Div": _elementwise,
    "Sigmoid": _elementwise,
    "Concat": _concat,
    "Resize": _resize,
}
