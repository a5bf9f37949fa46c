"""What follows a linear layer goes into its product, in an exported program: a gated GELU, a residual's sum.

A product of few inputs and many rows takes less time than reading and writing what it gives, so a pass more over it counts;
for others the vendor's product is so much faster than ours that it does not pay (`benchmarks/NOTES.md`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_LINEAR = torch.ops.aten.linear.default
_ADD = torch.ops.aten.add.Tensor
_MUL = torch.ops.aten.mul.Tensor
_GELU = torch.ops.aten.gelu.default
_CHUNK = torch.ops.aten.chunk.default
_DROPOUT = torch.ops.aten.dropout.default

Pays = Callable[[int, int, int], bool]
"""(rows, inputs, outputs) of a linear layer → whether ours is the faster."""


def pays_on_h100(rows: int, inputs: int, outputs: int) -> bool:
    """As measured in half precision: 8,192 rows of 320 inputs, the greatest maps of Stable Diffusion 1.5 in a batch of 2."""
    return rows >= 4096 and inputs <= 320


def join_linears_(program: ExportedProgram, pays: Pays = pays_on_h100) -> Mapping[str, int]:
    """Put `trexport::linear_geglu` and `trexport::linear_residual` where their patterns are, and it pays.

    Layers of sizes that are free in the program are left alone.

    Returns:
        how many of each were joined: `geglu`, `sum`.
    """
    graph = program.graph_module.graph
    found: Counter[str] = Counter()
    for node in list(graph.nodes):
        if node.target is _DROPOUT and node.args[2] is False:
            node.replace_all_uses_with(_nodes(node)[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is _MUL:
            _join_geglu(node, pays, found)
        elif node.target is _ADD:
            _join_sum(node, pays, found)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return dict(found)


def _join_geglu(product: fx.Node, pays: Pays, found: Counter[str]) -> None:
    """`values * gelu(gates)` of the halves of a linear layer."""
    factors = _nodes(product)
    if len(factors) != 2:
        return
    values, gelu = sorted(factors, key=lambda node: node.target is _GELU)
    if gelu.target is not _GELU or gelu.kwargs.get("approximate", "none") != "none":
        return
    (gates,) = _nodes(gelu)
    first, second = _half_of(values), _half_of(gates)
    if first is None or second is None or first[0] is not second[0] or (first[1], second[1]) != (0, 1):
        return
    linear = first[0]
    if not _is_linear(linear, pays) or any(len(node.users) != 1 for node in (values, gates, gelu, linear)):
        return
    _put(product, torch.ops.trexport.linear_geglu.default, _weights(linear))
    found["geglu"] += 1


def _join_sum(total: fx.Node, pays: Pays, found: Counter[str]) -> None:
    """`linear(x) + residual` of one shape."""
    summands = _nodes(total)
    if len(summands) != 2 or total.kwargs or summands[0] is summands[1]:
        return
    for linear, residual in (summands, summands[::-1]):
        if _is_linear(linear, pays) and len(linear.users) == 1 and _same(linear, residual):
            _put(total, torch.ops.trexport.linear_residual.default, (*_weights(linear), residual))
            found["sum"] += 1
            return


def _nodes(node: fx.Node) -> list[fx.Node]:
    """Those of a node's arguments that are nodes."""
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _half_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The node that this is a half of, along its last axis, and which."""
    chunks = _nodes(node)
    if len(chunks) != 1 or chunks[0].target is not _CHUNK or len(chunks[0].users) != 2:
        return None
    source, count, *rest = cast(tuple[Any, ...], chunks[0].args)
    axis = rest[0] if rest else chunks[0].kwargs.get("dim", 0)
    shape = source.meta["val"].shape
    if count != 2 or axis not in (-1, len(shape) - 1) or shape[-1] % 2:
        return None
    return source, cast(int, node.args[1])


def _is_linear(node: fx.Node, pays: Pays) -> bool:
    if node.target is not _LINEAR:
        return False
    value, weight = node.meta["val"], _nodes(node)[1].meta["val"]
    rows = math.prod(value.shape[:-1])
    return isinstance(rows, int) and pays(rows, weight.shape[1], weight.shape[0])


def _weights(linear: fx.Node) -> tuple[Any, ...]:
    x, weight, *bias = linear.args
    return x, weight, bias[0] if bias else None


def _same(node: fx.Node, other: fx.Node) -> bool:
    first, second = (n.meta.get("val") for n in (node, other))
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.shape == second.shape
        and first.dtype == second.dtype
    )


def _put(node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, arguments)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
