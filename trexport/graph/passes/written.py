"""A factored graph with its adapted weights as inputs: what a swappable one is, for who writes weights faster than a graph
computes with cores."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from trexport.graph.matching import op, replace
from trexport.graph.ops import DOMAIN
from trexport.graph.passes.swap import swap

_LINEAR = "AdaptedLinear"


def written(model: ir.Model, cores: Collection[str]) -> ir.Model:
    """Put the product with its weight in the place of every `ai.trlora::AdaptedLinear_…`; in place. The weights become
    overridable initialisers, the inputs for adapters are gone.

    Args:
        cores: the names of those inputs.

    Raises:
        ValueError: an operator that is no linear layer without a bank; `is_written` tells.
    """
    adapted = [node for node in model.graph if node.domain == DOMAIN]
    for node in adapted:
        if not node.op_type.startswith(_LINEAR):
            raise ValueError(f"{node.name}: {node.op_type}, expected a linear layer without a bank")
        x, weight, *rest = node.inputs
        y = node.outputs[0]
        assert x is not None
        assert weight is not None
        assert weight.shape is not None
        turned = op("Transpose", [weight], {"perm": [1, 0]}, like=weight, shape=list(weight.shape)[::-1])  # type: ignore[arg-type]
        made = [turned, op("MatMul", [x, turned.outputs[0]], like=y)]
        if rest and rest[0] is not None and rest[0].name == f"{node.name}.bias":
            made.append(op("Add", [made[-1].outputs[0], rest[0]], like=y))
        for one in made:
            one.metadata_props.update(node.metadata_props)
        replace(model.graph, y, made)
    names = [str(node.name) for node in adapted]
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name in cores]:
        model.graph.inputs.remove(value)
        model.graph.initializers.pop(str(value.name), None)
    RemoveUnusedFunctionsPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    return swap(model, names)
