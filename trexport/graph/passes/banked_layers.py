"""The linear layers of a bank with a weight for each sample in the place of cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import onnx_ir as ir

from trexport.graph.matching import replace
from trexport.graph.ops import DOMAIN
from trexport.graph.ops.body import Body
from trexport.graph.passes.written import parts_of_layer

_BANKED = "BankedLinear"


@final
@dataclass(frozen=True)
class BankedLayer:
    """A layer that is replaced."""

    path: str
    weight: ir.Value
    """(out, in), the base's."""
    place: ir.Value
    """(batch,), what each sample chooses; 0 is the base."""
    strength: ir.Value
    """(batch,)."""
    body: Body
    """For what computes the weights."""

    def sizes(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        assert self.weight.shape is not None
        rows, columns = self.weight.shape
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        return rows, columns

    def new_input(self, graph: ir.Graph, name: str, shape: Sequence[int]) -> ir.Value:
        """An input of the model in the weight's type, without a value."""
        value = ir.Value(name=name, type=self.weight.type, shape=ir.Shape(shape))
        graph.inputs.append(value)
        return value


def replace_banked(model: ir.Model, weights_of: Callable[[BankedLayer], ir.Value]) -> None:
    """Put a product with a weight for each sample in the place of every `ai.trlora::BankedLinear_…`; in place.

    Args:
        weights_of: gives the weights, (batch, in, out).

    Raises:
        ValueError: another operator of the domain.
    """
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        if not node.op_type.startswith(_BANKED):
            raise ValueError(f"{node.name}: {node.op_type}, expected a linear layer of a bank")
        x, weight, bias, (place, strength, *_) = parts_of_layer(node)
        assert place is not None
        assert strength is not None
        assert x.shape is not None
        body = Body("fp32")
        weights = weights_of(BankedLayer(str(node.name), weight, place, strength, body))
        if x.shape.rank() == 2:  # a row a sample
            one = body.ints([1])
            y = body.op("Squeeze", body.matmul(body.op("Unsqueeze", x, one), weights), one)
        else:
            y = body.matmul(x, weights)
        if bias is not None:
            y = body.op("Add", y, bias)
        for inner in body.nodes:
            inner.metadata_props.update(node.metadata_props)
            inner.outputs[0].name = f"{node.name}.{inner.outputs[0].name}"
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        replace(model.graph, node.outputs[0], body.nodes)
