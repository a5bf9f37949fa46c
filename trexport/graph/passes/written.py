"""A factored graph with its adapted weights as inputs: what a swappable one is, for who writes weights faster than a graph
computes with cores."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from trexport.graph.matching import is_op, op, replace
from trexport.graph.ops import DOMAIN
from trexport.graph.passes.swap import swap

_LINEAR, _CONVOLUTION = "AdaptedLinear", "AdaptedConv"


def written(model: ir.Model, cores: Collection[str]) -> ir.Model:
    """Put the product or convolution with its weight in the place of every `ai.trlora::AdaptedLinear_…` and
    `ai.trlora::AdaptedConv_…`; in place. The weights become overridable initialisers, the inputs for adapters are gone.

    Args:
        cores: the names of those inputs.

    Raises:
        ValueError: an operator of a bank; `is_written` tells.
    """
    adapted = [node for node in model.graph if node.domain == DOMAIN]
    for node in adapted:
        x, weight, bias, _ = parts_of_layer(node)
        if node.op_type.startswith(_LINEAR):
            made = _linear(x, weight, bias, node.outputs[0])
        elif node.op_type.startswith(_CONVOLUTION):
            made = [_convolution(model.functions[node.op_identifier()], x, weight, bias, node.outputs[0])]
        else:
            raise ValueError(f"{node.name}: {node.op_type}, expected a linear layer or a convolution without a bank")
        for one in made:
            one.metadata_props.update(node.metadata_props)
        replace(model.graph, node.outputs[0], made)
    names = [str(node.name) for node in adapted]
    return swap(without_cores(model, cores), names)


def parts_of_layer(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None, list[ir.Value | None]]:
    """Of an adapted layer the input, the weight, the bias, and what is for adapters."""
    x, weight, *rest = node.inputs
    assert x is not None
    assert weight is not None
    if rest and rest[0] is not None and rest[0].name == f"{node.name}.bias":
        return x, weight, rest[0], rest[1:]
    return x, weight, None, rest


def without_cores(model: ir.Model, cores: Collection[str]) -> ir.Model:
    """A graph that has no adapted operators any more without the inputs and functions of these; in place."""
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name in cores]:
        model.graph.inputs.remove(value)
        model.graph.initializers.pop(str(value.name), None)
    RemoveUnusedFunctionsPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    return model


def _linear(x: ir.Value, weight: ir.Value, bias: ir.Value | None, y: ir.Value) -> list[ir.Node]:
    assert weight.shape is not None
    turned = op("Transpose", [weight], {"perm": [1, 0]}, like=weight, shape=list(weight.shape)[::-1])  # type: ignore[arg-type]
    made = [turned, op("MatMul", [x, turned.outputs[0]], like=y)]
    return made if bias is None else [*made, op("Add", [made[-1].outputs[0], bias], like=y)]


def _convolution(function: ir.Function, x: ir.Value, weight: ir.Value, bias: ir.Value | None, y: ir.Value) -> ir.Node:
    """With the stride, padding, dilation and groups of those in the operator that read its input."""
    inner = next(use.node for use in function.inputs[0].uses() if is_op(use.node, "Conv"))
    assert weight.shape is not None
    attributes = {**inner.attributes, "kernel_shape": list(weight.shape)[2:]}
    return op("Conv", [x, weight, *([] if bias is None else [bias])], attributes, like=y)
