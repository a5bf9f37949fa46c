"""`ai.trlora::MergedWeight_…`, the operator that merges adapters into a weight: what `merge.onnx` of a swappable artifact is
made of.

    W' = W + Σ_k s_k (W·(T_k − I) + Δ_k)

| input | shape | type |
|---|---|---|
| W | (out, in), as in torch | T |
| strength | (adapters,) | float32 |
| then the tensors of the transforms and of the residuals | (adapters, …): stacked | float32 |

Output Y (out, in), type T: computed in float32 and cast once. T is float, float16 or bfloat16. At strength zero it is W, to
the last bit (but for the sign of a zero). The tensors of each member: see `trexport.graph.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import onnx_ir as ir

from trexport.graph.ops import DOMAIN
from trexport.graph.ops.body import ONNX_DTYPES, Body
from trexport.graph.ops.slots import STRENGTH, LayerSlot
from trexport.io_spec import Dtype


@final
@dataclass(frozen=True)
class WeightSignature:
    """What a function is written for."""

    slot: LayerSlot
    out_features: int
    in_features: int
    dtype: Dtype

    def name(self) -> str:
        return f"MergedWeight_{self.slot.signature()}_{self.in_features}to{self.out_features}"


def weight_function(signature: WeightSignature, name: str, opset: int) -> ir.Function:
    """The function `name` of domain `ai.trlora`."""
    body, slot = Body("fp32", stacked=True), signature.slot
    weight, strength = ir.val("W"), ir.val(STRENGTH)
    values = [ir.val(key.replace(".", "_")) for key in slot.names()]
    split = len(slot.transform.shapes) if slot.transform is not None else 0
    half = signature.dtype != "fp32"
    wide = body.op("Cast", weight, to=int(ONNX_DTYPES["fp32"])) if half else weight
    change: ir.Value | None = None
    if slot.transform is not None:
        change = body.op("Sub", slot.transform.weight(body, wide, values[:split]), wide)
    if slot.residual is not None:
        right, left = slot.residual.factors(body, values[split:])
        delta = body.matmul(left, body.turn(right, [1, 0]))
        change = delta if change is None else body.op("Add", change, delta)
    assert change is not None
    # scaled and summed as one product, (1, adapters) · (adapters, out·in): an eighth of the time of Mul and ReduceSum
    size = signature.out_features * signature.in_features
    total = body.matmul(body.reshape(strength, [1, -1]), body.reshape(change, [-1, size]))
    y = body.op("Add", wide, body.reshape(total, [signature.out_features, signature.in_features]))
    if half:
        y = body.op("Cast", y, to=int(ONNX_DTYPES[signature.dtype]))
    y.name = "Y"
    graph = ir.Graph([weight, strength, *values], [y], nodes=body.nodes, opset_imports={"": opset}, name=name)
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    shapes = [f"{part} {op.type}: {dict(op.shapes)}" for part, op in slot.parts.items()]
    function.doc_string = "\n".join(
        [
            "Y = W + sum_k s_k (W (T_k - I) + Delta_k), adapters along the first axis of each tensor; of one adapter:",
            *shapes,
        ]
    )
    return function
