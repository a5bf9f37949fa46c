"""A bank with what adapters change in whole weights as its inputs, for who writes weights faster than a graph computes with
cores."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from trexport.graph.matching import replace
from trexport.graph.ops import DOMAIN
from trexport.graph.ops.body import Body
from trexport.graph.passes.written import parts_of_layer, without_cores

_BANKED = "BankedLinear"


def change_name(path: str) -> str:
    """The input that holds a layer's stack."""
    return f"{path}.change"


def written_bank(model: ir.Model, cores: Collection[str], places: int) -> ir.Model:
    """Put `x·(W0 + s·change)` in the place of every `ai.trlora::BankedLinear_…`, each sample with the place and the strength
    that it chooses as before; in place. The inputs for cores are gone, those that choose stay.

    The changes are inputs without a value, `<path>.change`, (places + 1, in, out) in the weight's type; place 0 is to be
    zero.

    Args:
        cores: the names of the inputs that are stacks of cores.

    Raises:
        ValueError: another operator; `is_written` tells.
    """
    scale: ir.Value | None = None
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        if not node.op_type.startswith(_BANKED):
            raise ValueError(f"{node.name}: {node.op_type}, expected a linear layer of a bank")
        x, weight, bias, (place, strength, *_) = parts_of_layer(node)
        assert place is not None
        assert strength is not None
        assert weight.shape is not None
        assert x.shape is not None
        rows, columns = weight.shape
        stack = ir.Value(
            name=change_name(str(node.name)), type=weight.type, shape=ir.Shape([places + 1, columns, rows])
        )
        model.graph.inputs.append(stack)
        body = Body("fp32")
        if scale is None:  # one for all layers
            scale = body.reshape(body.op("CastLike", strength, weight), [-1, 1, 1])
        change = body.op("Mul", body.op("Gather", stack, place, axis=0), scale)
        whole = body.op("Add", change, body.transpose(weight, [1, 0]))
        if x.shape.rank() == 2:  # a row a sample
            one = body.ints([1])
            y = body.op("Squeeze", body.matmul(body.op("Unsqueeze", x, one), whole), one)
        else:
            y = body.matmul(x, whole)
        if bias is not None:
            y = body.op("Add", y, bias)
        for inner in body.nodes:
            inner.metadata_props.update(node.metadata_props)
            inner.outputs[0].name = f"{node.name}.{inner.outputs[0].name}"
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        replace(model.graph, node.outputs[0], body.nodes)
    return without_cores(model, cores)
