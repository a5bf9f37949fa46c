"""Attention into ONNX Runtime's `MultiHeadAttention`, which takes heads side by side: no transposes, and no matrix of scores
in memory where it has a flash kernel (half precision, heads of a multiple of 8, up to 256)."""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, dims, finish, is_op, made_by, number, op, permutation, replace

_SPLIT = [0, 2, 1, 3]
_HALF_PRECISION = 2**-10


class _Site(NamedTuple):
    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float | None


def multi_head_attention(model: ir.Model) -> int:
    """Replace attention of separate heads, as `Attention` without mask or cache or as plain products, with the splitting of
    heads before it and the joining after, by `com.microsoft.MultiHeadAttention` of (batch, tokens, heads·width); in place.
    Returns how many. Self- and cross-attention; masks and causal attention are left as they are.
    """
    sites = 0
    for node in list(model.graph):
        site = _operator(node) if is_op(node, "Attention") else _products(node) if is_op(node, "MatMul") else None
        joined = None if site is None else _joined(node.outputs[0])
        if site is None or joined is None:
            continue
        split = [_split(value) for value in (site.query, site.key, site.value)]
        given = [part for part in split if part is not None]
        if len(given) != 3 or len({(heads, width) for _, heads, width in given}) != 1:
            continue
        _, heads, width = given[0]
        if dims(joined) != [*(dims(given[0][0]) or [])[:2], heads * width]:
            continue
        attributes: dict[str, object] = {"num_heads": heads}
        if site.scale is not None and not math.isclose(site.scale, width**-0.5, rel_tol=_HALF_PRECISION):
            attributes["scale"] = site.scale  # else its own, which the exporter has rounded to half precision
        inputs = [value for value, _, _ in given]
        replace(
            model.graph,
            joined,
            [op("MultiHeadAttention", inputs, attributes, like=joined, domain=MICROSOFT)],
        )
        sites += 1
    return finish(model, sites)


def _operator(node: ir.Node) -> _Site | None:
    """`Attention` of four dimensions without mask, cache or soft cap."""
    query, key, value, *others = node.inputs
    attributes = node.attributes
    special = attributes.get_int("is_causal", 0) or attributes.get_float("softcap", 0.0)
    if special or any(other is not None for other in others) or len(node.outputs) != 1 or "q_num_heads" in attributes:
        return None
    if query is None or key is None or value is None:
        return None
    return _Site(query, key, value, attributes.get_float("scale", 0.0) or None)


def _products(node: ir.Node) -> _Site | None:
    """`softmax(a·Q · (b·K)ᵀ) · V`."""
    weights, value = node.inputs
    softmax = made_by(weights, "Softmax")
    scores = None if softmax is None else made_by(softmax.inputs[0], "MatMul")
    if softmax is None or scores is None or value is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    query, left = _scaled(scores.inputs[0])
    turned, right = _scaled(scores.inputs[1])
    key = _turned(turned)
    return None if key is None or query is None else _Site(query, key, value, left * right)


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = made_by(value, "Mul")
    if node is None:
        return value, 1.0
    for factor, other in (node.inputs, node.inputs[::-1]):
        cast = made_by(factor, "CastLike")
        found = number(factor if cast is None else cast.inputs[0])
        if found is not None:
            return other, found
    return value, 1.0


def _turned(value: ir.Value | None) -> ir.Value | None:
    """What the last two axes are exchanged of: by one `Transpose`, or, as the exporter writes it, by one of three dimensions
    between two reshapes that undo each other."""
    node = None if value is None else value.producer()
    if permutation(node) == [0, 1, 3, 2]:
        assert node is not None
        return node.inputs[0]
    last = made_by(value, "Reshape")
    turn = None if last is None else made_by(last.inputs[0], "Transpose")
    first = None if turn is None else made_by(turn.inputs[0], "Reshape")
    if first is None or permutation(turn) != [0, 2, 1]:
        return None
    key = first.inputs[0]
    sizes, result = dims(key), dims(last.outputs[0] if last is not None else None)
    if sizes is None or len(sizes) != 4:
        return None
    # with free axes the result's shape is computed by the graph; multiplied with the queries, it has their batch and heads
    return key if result is None or result == [*sizes[:2], sizes[3], sizes[2]] else None


def _split(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """(batch, tokens, heads·width) that (batch, heads, tokens, width) is made of, with heads and width."""
    turn = made_by(value, "Transpose")
    view = None if turn is None or permutation(turn) != _SPLIT else made_by(turn.inputs[0], "Reshape")
    if view is None or view.inputs[0] is None:
        return None
    flat, apart = dims(view.inputs[0]), dims(view.outputs[0])
    if flat is None or apart is None or len(flat) != 3 or len(apart) != 4 or flat[:2] != apart[:2]:
        return None
    heads, width = apart[2:]
    if not isinstance(heads, int) or not isinstance(width, int) or flat[2] != heads * width:
        return None
    return view.inputs[0], heads, width


def _joined(value: ir.Value) -> ir.Value | None:
    """(batch, tokens, heads·width) that the result becomes, and nothing else."""
    uses = [use.node for use in value.uses()]
    if len(uses) != 1 or value.is_graph_output() or permutation(uses[0]) != _SPLIT:
        return None
    uses = [use.node for use in uses[0].outputs[0].uses()]
    return uses[0].outputs[0] if len(uses) == 1 and is_op(uses[0], "Reshape") else None
