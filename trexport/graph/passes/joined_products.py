"""Products of one input in one product: keys and values of the text, and the time embedding of all residual blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import final

import numpy as np
import onnx_ir as ir

from trexport.graph.matching import dims, finish, is_op, made_by, new_constant, op, permutation, replace

LEAST = 4
"""Products, of one width, that are joined: taking the results apart is a kernel too, so that queries, keys and values of one
self-attention are not worth it."""
MOST = 32
"""Products in one: what ONNX Runtime's kernels of `Concat` and `Split` take without a table in the host's memory, which a
CUDA graph would read at every replay."""
MOST_FED = 2**26
"""Bytes of weights that are fed, whose `Concat` runs in every step."""


@final
@dataclass
class _Group:
    x: ir.Value
    turned: bool
    """Whether the weights are (out, in) and turned by a `Transpose`."""
    nodes: list[ir.Node] = field(default_factory=list)
    weights: list[ir.Value] = field(default_factory=list)

    def parts(self) -> list[_Group]:
        """Of `MOST` products each, the last one of what is left."""
        starts = range(0, len(self.nodes), MOST)
        return [
            _Group(self.x, self.turned, self.nodes[start : start + MOST], self.weights[start : start + MOST])
            for start in starts
        ]

    @property
    def fed_bytes(self) -> int:
        return sum(
            weight.const_value.nbytes
            for weight in self.weights
            if weight.is_graph_input() and weight.const_value is not None
        )


def joined_products(model: ir.Model) -> int:
    """Replace `MatMul`s and `Gemm`s of one input by weights of one shape, where there are `LEAST` or more, by one of the
    weights side by side, and a `Split` into equal parts, of at most `MOST`; in place. Returns how many products are gone.

    The weights' `Concat` is a node: ONNX Runtime folds it when it loads the graph, or, of weights that are all fed, runs it:
    those are joined up to `MOST_FED`.
    """
    groups: dict[Hashable, _Group] = {}
    for node in model.graph:
        found = _product(node) if is_op(node, "MatMul") or is_op(node, "Gemm") else None
        if found is None:
            continue
        x, weight, turned, kind = found
        key = (id(x), turned, tuple(dims(weight) or ()), kind, weight.is_graph_input())
        group = groups.setdefault(key, _Group(x, turned))
        group.nodes.append(node)
        group.weights.append(weight)
    sites = 0
    for group in groups.values():
        for part in group.parts():
            if len(part.nodes) >= LEAST and part.fed_bytes <= MOST_FED:
                _join(model.graph, part)
                sites += len(part.nodes) - 1
    return finish(model, sites)


def _product(node: ir.Node) -> tuple[ir.Value, ir.Value, bool, Hashable] | None:
    """Input, weight, whether that is turned, and what else has to be the same."""
    x, weight, *biases = node.inputs
    result = dims(node.outputs[0])
    if x is None or weight is None or result is None or node.outputs[0].is_graph_output():
        return None
    if node.op_type == "MatMul":
        turn = made_by(weight, "Transpose")
        if turn is not None and permutation(turn) == [1, 0]:
            weight = turn.inputs[0]
        if weight is None or not weight.is_initializer() or len(dims(weight) or []) != 2:
            return None
        return x, weight, turn is not None, ("MatMul", weight.dtype)
    attributes = node.attributes
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    if not plain or attributes.get_int("transA", 0) or not attributes.get_int("transB", 0) or len(biases) != 1:
        return None
    (bias,) = biases
    if bias is None or not bias.is_initializer() or not weight.is_initializer() or dims(bias) != result[1:]:
        return None
    return x, weight, True, ("Gemm", weight.dtype)


def _join(graph: ir.Graph, group: _Group) -> None:
    first, number = group.nodes[0], len(group.nodes)
    old = first.outputs[0]
    rows, columns = (int(size) for size in dims(group.weights[0]) or [])
    *outer, width = dims(old) or []
    axis = 0 if group.turned else 1
    shape = [number * rows, columns] if group.turned else [rows, number * columns]
    weight = op("Concat", group.weights, {"axis": axis}, like=group.weights[0], shape=shape)
    made = [weight]
    if first.op_type == "Gemm":
        given = [node.inputs[2] for node in group.nodes]
        assert given[0] is not None
        bias = op("Concat", given, {"axis": 0}, like=given[0], shape=[number * rows])
        inputs: list[ir.Value | None] = [group.x, weight.outputs[0], bias.outputs[0]]
        made.append(bias)
    else:
        taken = weight.outputs[0]
        if group.turned:
            made.append(op("Transpose", [taken], {"perm": [1, 0]}, like=taken, shape=shape[::-1]))
            taken = made[-1].outputs[0]
        inputs = [group.x, taken]
    assert isinstance(width, int)
    product = op(first.op_type, inputs, dict(first.attributes), like=old, shape=[*outer, number * width])
    sizes = new_constant(graph, np.full(number, width, dtype=np.int64), f"{number}_times_{width}")
    split = op("Split", [product.outputs[0], sizes], {"axis": len(outer)}, like=old)
    split.resize_outputs(number)
    for output in split.outputs:
        output.type, output.shape = old.type, old.shape
    replace(graph, old, [*made, product, split], split.outputs[0])
    for node, output in zip(group.nodes[1:], split.outputs[1:], strict=True):
        name = node.outputs[0].name
        node.outputs[0].replace_all_uses_with(output)
        node.outputs[0].name, output.name = f"{name}.replaced", name
