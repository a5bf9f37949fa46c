"""Reading a graph from a value backwards and forwards: what passes that look for patterns share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators, documented in its `docs/ContribOperators.md`."""


def made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that computes a value, where it is of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and is_op(node, op_type, domain) else None


def is_op(node: ir.Node, op_type: str, domain: str = "") -> bool:
    """Whether a node is of an operator; the standard domain has two names."""
    return node.op_type == op_type and (node.domain == domain or {node.domain, domain} <= set(STANDARD))


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, once; None for several, or where the graph gives the value out."""
    uses = value.uses()
    return None if len(uses) != 1 or value.is_graph_output() else next(iter(uses)).node


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The elements of a value that nobody can feed: an initialiser that is no graph input."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value) -> bool:
    """Whether it is an initialiser that nobody can feed."""
    return value.is_initializer() and not value.is_graph_input()


def number(value: ir.Value | None) -> float | None:
    """The one element of a constant."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    found = constant(value)
    return None if found is None else float(found.reshape(-1)[0])


def integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant of integers, a shape for instance."""
    if value is None or value.const_value is None or not value.const_value.dtype.is_integer():
        return None
    found = constant(value)
    return None if found is None else [int(element) for element in found.reshape(-1)]


def new_constant(graph: ir.Graph, elements: np.ndarray, name: str) -> ir.Value:
    """An initialiser of a name that says what it holds: one that is there already is taken."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(elements), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(elements.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def dims(value: ir.Value | None) -> list[int | str] | None:
    """The sizes of a value, free axes by name; None where the rank or a size is not known."""
    if value is None or value.shape is None:
        return None
    found = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in found else [size for size in found if size is not None]


def permutation(node: ir.Node | None) -> list[int] | None:
    """What a `Transpose` does, where its attribute says so."""
    if node is None or not is_op(node, "Transpose") or "perm" not in node.attributes:
        return None
    return list(node.attributes["perm"].as_ints())


def linear_bias(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """`biased`, where the sum has no other reader: an operator that adds a bias itself can take it apart."""
    return None if value is None or only_user(value) is None else biased(value)


def biased(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What goes into an `Add` of a row, and the row: a product with its bias. The row may be an input that has a value."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for bias, product in (add.inputs, add.inputs[::-1]):
        if bias is None or product is None or not bias.is_initializer():
            continue
        sizes, row = dims(product), dims(bias)
        if sizes is not None and row is not None and len(sizes) > 1 and row == sizes[-1:]:
            return product, bias
    return None


def op(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, object] | None = None,
    *,
    like: ir.Value,
    domain: str = "",
    shape: Sequence[int | str] | None = None,
) -> ir.Node:
    """A node of one output with the type of `like`, and its shape unless another is given; it comes from the torch module
    that `like` comes from."""
    producer = like.producer()
    result = ir.Value(type=like.type, shape=ir.Shape(shape) if shape is not None else like.shape)
    props = {} if producer is None else dict(producer.metadata_props)
    return ir.node(op_type, inputs, attributes, domain=domain, outputs=[result], metadata_props=props)  # type: ignore[arg-type]


def replace(graph: ir.Graph, old: ir.Value, nodes: Sequence[ir.Node], new: ir.Value | None = None) -> None:
    """Put nodes before the one that computes `old`, and the last one's first output, or `new`, in the place of `old`, whose
    name it takes. `finish` removes what nothing reads any more."""
    producer = old.producer()
    assert producer is not None
    new = nodes[-1].outputs[0] if new is None else new
    graph.insert_before(producer, list(nodes))
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.replaced", name


def finish(model: ir.Model, sites: int) -> int:
    """Remove what is not read any more, and put the nodes in an order; returns `sites`, what a pass has to tell."""
    if sites:
        RemoveUnusedNodesPass()(model)
        model.graph.sort()
        used = {node.domain for node in model.graph if node.domain == MICROSOFT}
        model.opset_imports.update(dict.fromkeys(used, 1))
    return sites
