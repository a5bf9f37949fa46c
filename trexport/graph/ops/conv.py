"""`ai.trlora::AdaptedConv_…`, the operator of one adapted convolution.

    Y = Conv(X, W', B),   W' = W + Σ_k s_k (diag(G_k)·(U_kᵀ·W·T_k + Δ_k) − W)

W and W' as matrices, (out, in/groups·height·width). Where adapters have residuals alone, `Δ = L·Rᵀ`, the path `activations`
is two thin convolutions beside the layer's own: R of its kernel, stride, padding, dilation and groups, then L of 1×1. A
transform mixes the taps of overlapping patches and has no form on activations: the path `weight` rebuilds W'.

| input | shape | type |
|---|---|---|
| X | (batch, in, height, width) | T |
| W | (out, in/groups, height, width), as in torch | T |
| B (where the layer has one) | (out,) | T |
| for each adapter: strength | (1,) | float32 |
| then the tensors of its parts, in the order of `trlora.spec.PARTS` | see the members in `trexport.graph.ops` | float32 |

Output Y (batch, out, …), type T, as of `ai.trlora::AdaptedLinear_…`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import onnx_ir as ir

from trexport.graph.ops import DOMAIN
from trexport.graph.ops.body import Body
from trexport.graph.ops.linear import Taken, documentation, gained, rebuilt
from trexport.graph.ops.plan import Path
from trexport.graph.ops.slots import STRENGTH, LayerSlot
from trexport.io_spec import Dtype


@final
@dataclass(frozen=True)
class ConvSignature:
    """What a function is written for."""

    slots: tuple[LayerSlot, ...]
    shape: tuple[int, int, int, int]
    """Of the weight."""
    bias: bool
    attributes: Mapping[str, tuple[int, ...] | int | str]
    """Of the `Conv` that it stands in the place of."""
    path: Path
    dtype: Dtype

    @property
    def groups(self) -> int:
        groups = self.attributes.get("group", 1)
        assert isinstance(groups, int)
        return groups

    def name(self) -> str:
        rows, columns, *kernel = self.shape
        groups = f"g{self.groups}" if self.groups > 1 else ""
        parts = ["AdaptedConv", *(slot.signature() for slot in self.slots)]
        parts += [f"{columns * self.groups}to{rows}k{'x'.join(map(str, kernel))}{groups}", self.path]
        return "_".join([*parts, *(["bias"] if self.bias else [])])


def conv_function(signature: ConvSignature, name: str, opset: int) -> ir.Function:
    """The function `name` of domain `ai.trlora`."""
    body = Body(signature.dtype)
    x, weight = ir.val("X"), ir.val("W")
    bias = ir.val("B") if signature.bias else None
    inputs = [x, weight, *([bias] if bias is not None else [])]
    slots: list[Taken] = []
    for number, slot in enumerate(signature.slots):
        strength = ir.val(f"{STRENGTH}_{number}")
        values = [ir.val(f"{key.replace('.', '_')}_{number}") for key in slot.names()]
        inputs += [strength, *values]
        slots.append((slot, body.narrow(strength), slot.split(values)))

    def conv(value: ir.Value, kernel: ir.Value, offset: ir.Value | None = None) -> ir.Value:
        given = [value, kernel, *([offset] if offset is not None else [])]
        return body.op("Conv", *given, **signature.attributes)  # type: ignore[arg-type]

    if signature.path == "weight":
        rows, columns = signature.shape[0], math.prod(signature.shape[1:])
        flat = body.reshape(weight, [rows, columns])
        whole = body.reshape(rebuilt(body, flat, slots), signature.shape)
        y = conv(x, whole, None if bias is None else gained(body, bias, slots))
    else:
        y = conv(x, weight, bias)
        for taken in slots:
            y = body.op("Add", y, _beside(body, conv, x, taken, signature))
    y.name = "Y"
    graph = ir.Graph(inputs, [y], nodes=body.nodes, opset_imports={"": opset}, name=name)
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    formula = "Y = Conv(X, W', B), W' = W + sum_k s_k (diag(G_k) (U_k^T W T_k + Delta_k) - W)."
    function.doc_string = documentation(formula, signature.path, signature.slots)
    return function


def _beside(
    body: Body, conv: Callable[[ir.Value, ir.Value], ir.Value], x: ir.Value, taken: Taken, signature: ConvSignature
) -> ir.Value:
    """`s·Conv(X, Δ)`: every group has R in full, so that a thin convolution of r·groups channels comes before L."""
    slot, strength, values = taken
    assert slot.residual is not None
    right, left = slot.residual.factors(body, values["residual"])
    groups, rank = signature.groups, slot.residual.rank
    kernel = body.reshape(body.transpose(right, [1, 0]), [rank, *signature.shape[1:]])
    if groups > 1:
        kernel = body.op("Concat", *[kernel] * groups, axis=0)
    thin = conv(x, kernel)
    scaled = body.op("Mul", thin, strength)
    return body.op("Conv", scaled, body.reshape(left, [signature.shape[0], rank, 1, 1]), group=groups)
