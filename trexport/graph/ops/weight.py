"""`ai.trlora::MergedWeight_…`, the operator that merges adapters into a weight: what `merge.onnx` of a swappable artifact is
made of.

    W' = W + Σ_k s_k (diag(G_k)·(U_kᵀ·W·T_k + Δ_k) − W)

G_k is the gain of an adapter's magnitude, one where it has none, U_k its transform of outputs, the identity where it
has none.

| input | shape | type |
|---|---|---|
| W | (out, in), or of a convolution (out, in/groups, height, width), as in torch | T |
| strength | (adapters,) | float32 |
| then the tensors of the parts, in the order of `trlora.spec.PARTS` | (adapters, …): stacked | float32 |

Output Y, of the shape of W, type T: computed in float32 and cast once. T is float, float16 or bfloat16. At strength zero it
is W, to the last bit (but for the sign of a zero). The tensors of each member: see `trexport.graph.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import onnx_ir as ir

from trexport.graph.ops import DOMAIN, TransformOp
from trexport.graph.ops.body import ONNX_DTYPES, Body
from trexport.graph.ops.slots import STRENGTH, LayerSlot
from trexport.io_spec import Dtype


@final
@dataclass(frozen=True)
class WeightSignature:
    """What a function is written for."""

    slot: LayerSlot
    shape: tuple[int, ...]
    """Of the weight, (out, in) or (out, in/groups, height, width)."""
    dtype: Dtype

    def name(self) -> str:
        taps = "x".join(map(str, self.shape[2:]))
        return f"MergedWeight_{self.slot.signature()}_{self.shape[1]}to{self.shape[0]}{'k' * bool(taps)}{taps}"


def weight_function(signature: WeightSignature, name: str, opset: int) -> ir.Function:
    """The function `name` of domain `ai.trlora`."""
    body, slot = Body("fp32", stacked=True), signature.slot
    weight, strength = ir.val("W"), ir.val(STRENGTH)
    values = [ir.val(key.replace(".", "_")) for key in slot.names()]
    half = signature.dtype != "fp32"
    wide = body.op("Cast", weight, to=int(ONNX_DTYPES["fp32"])) if half else weight
    rows, columns, kernel = signature.shape[0], math.prod(signature.shape[1:]), signature.shape[2:]
    if kernel:  # as a matrix
        wide = body.reshape(wide, [rows, columns])
    change = weight_change(body, wide, slot, slot.split(values))
    assert change is not None
    # scaled and summed as one product, (1, adapters) · (adapters, out·in): an eighth of the time of Mul and ReduceSum
    total = body.matmul(body.reshape(strength, [1, -1]), body.reshape(change, [-1, rows * columns]))
    y = body.op("Add", wide, body.reshape(total, [rows, columns]))
    if kernel:
        y = body.reshape(y, signature.shape)
    if half:
        y = body.op("Cast", y, to=int(ONNX_DTYPES[signature.dtype]))
    y.name = "Y"
    graph = ir.Graph([weight, strength, *values], [y], nodes=body.nodes, opset_imports={"": opset}, name=name)
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    shapes = [f"{part} {op.type}: {dict(op.shapes)}" for part, op in slot.parts.items()]
    function.doc_string = "\n".join(
        [
            "Y = W + sum_k s_k (diag(G_k) (U_k^T W T_k + Delta_k) - W), adapters along the first axis of tensors; of one:",
            *shapes,
        ]
    )
    return function


def weight_change(
    body: Body, weight: ir.Value, slot: LayerSlot, values: Mapping[str, list[ir.Value]]
) -> ir.Value | None:
    """`diag(G)·(Uᵀ·W·T + Δ) − W` of one slot, (out, in), with a leading axis in a stacked body; None for one without parts.

    Args:
        weight: W as a matrix.
        values: the slot's tensors, by part.
    """
    change: ir.Value | None = None
    if slot.transform is not None:
        change = body.op("Sub", slot.transform.weight(body, weight, values["transform"]), weight)
    if slot.output_transform is not None:
        change = _turned(body, weight, change, slot.output_transform, values["output_transform"])
    if slot.residual is not None:
        delta = slot.residual.delta(body, values["residual"])
        change = delta if change is None else body.op("Add", change, delta)
    if slot.magnitude is not None:
        whole = weight if change is None else body.op("Add", weight, change)
        gain = slot.magnitude.gain(body, whole, values["magnitude"])
        change = body.op("Sub", body.op("Mul", gain, whole), weight)
    return change


def _turned(body: Body, weight: ir.Value, change: ir.Value | None, op: TransformOp, values: list[ir.Value]) -> ir.Value:
    """`Uᵀ·(W + change) − W`: U on the outputs is to the transposed weight what T on the inputs is to the weight."""
    if change is None:
        turned = op.weight(body, body.transpose(weight, [1, 0]), values)
    else:
        rank = 3 if body.stacked else 2
        turned = op.weight(body, body.turn(body.op("Add", weight, change), [1, 0]), values, rank)
    return body.op("Sub", body.turn(turned, [1, 0]), weight)
