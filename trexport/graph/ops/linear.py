"""`ai.trlora::AdaptedLinear_…`, the operator of one adapted linear layer.

    Y = X·W'ᵀ + B,   W' = W·(I + Σ_k s_k (T_k − I)) + Σ_k s_k Δ_k

and where an adapter has a magnitude, whose gain G stands outside, or a transform U of outputs,
`s_k (diag(G_k)·(U_kᵀ·W·T_k + Δ_k) − W)` in its stead; a bias that takes the gain as well becomes `B + Σ_k s_k (G_k − 1)·B`.

| input | shape | type |
|---|---|---|
| X | (…, in) | T |
| W | (out, in), as in torch | T |
| B (where the layer has one) | (out,) | T |
| for each adapter: strength | (1,) | float32 |
| then the tensors of its parts, in the order of `trlora.spec.PARTS` | see the members in `trexport.graph.ops` | float32 |

Of a bank, `ai.trlora::BankedLinear_…`, every sample b has an adapter k = I[b] of its own, at its own strength:

    Y[b] = X[b]·W'[b]ᵀ + B,   W'[b] = W·(I + s[b] (T_k − I)) + s[b] Δ_k

| input | shape | type |
|---|---|---|
| X, W, B | (batch, …, in) and as above | T |
| index I | (batch,), or (1,) for all | int64, place in the stack |
| strength s | (batch,), or (1,) for all | float32 |
| then the tensors of the parts, in the same order | (adapters, …): stacked | float32 |

Output Y (…, out), type T. T is float, float16 or bfloat16: that of the artifact, for which the functions are written. The
name tells the members with their ranks, the layer's shape and the path (see `trexport.graph.ops.plan`); layers that agree in
all of it share one function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import onnx_ir as ir

from trexport.graph.ops import DOMAIN
from trexport.graph.ops.body import Body
from trexport.graph.ops.plan import Path
from trexport.graph.ops.slots import INDEX, STRENGTH, LayerSlot
from trexport.graph.ops.weight import weight_change
from trexport.io_spec import Dtype


@final
@dataclass(frozen=True)
class LinearSignature:
    """What a function is written for."""

    slots: tuple[LayerSlot, ...]
    out_features: int
    in_features: int
    bias: bool
    rank: int
    """Dimensions of X."""
    path: Path
    dtype: Dtype
    bank: bool = False
    """An adapter for every sample, of a stack; there is one slot then."""

    def name(self) -> str:
        parts = ["BankedLinear" if self.bank else "AdaptedLinear", *(slot.signature() for slot in self.slots)]
        parts += [f"{self.in_features}to{self.out_features}", self.path]
        parts += ["bias"] if self.bias else []
        return "_".join([*parts, f"{self.rank}d"])


def linear_function(signature: LinearSignature, name: str, opset: int) -> ir.Function:
    """The function `name` of domain `ai.trlora`."""
    body = Body(signature.dtype, stacked=signature.bank)
    x, weight = ir.val("X"), ir.val("W")
    inputs = [x, weight]
    bias = ir.val("B") if signature.bias else None
    inputs += [bias] if bias is not None else []
    index = ir.val(INDEX) if signature.bank else None
    inputs += [index] if index is not None else []
    slots: list[Taken] = []
    for number, slot in enumerate(signature.slots):
        strength = ir.val(f"{STRENGTH}_{number}")
        values = [ir.val(f"{key.replace('.', '_')}_{number}") for key in slot.names()]
        inputs += [strength, *values]
        scale = body.narrow(strength)
        if index is not None:
            scale = body.reshape(scale, [-1, 1, 1])
            values = [body.op("Gather", value, index, axis=0) for value in values]
        slots.append((slot, scale, slot.split(values)))
    rank, flat = signature.rank, signature.bank and signature.rank == 2
    if flat:  # (batch, in): a row a sample
        x, rank = body.op("Unsqueeze", x, body.ints([1])), 3
    if signature.path == "weight":
        y = body.matmul(x, body.turn(rebuilt(body, weight, slots), [1, 0]))
        added = None
        bias = None if bias is None else gained(body, bias, slots)
    else:
        assert not any(slot.outside for slot, _, _ in slots), "something stands outside: see plan_layer"
        moved, added = _moved(body, x, slots, rank, dense=signature.path == "dense"), _added(body, x, slots, rank)
        y = body.matmul(moved, body.transpose(weight, [1, 0]))
    if bias is not None:
        y = body.op("Add", y, bias)
    if added is not None:
        y = body.op("Add", y, added)
    if flat:
        y = body.op("Squeeze", y, body.ints([1]))
    y.name = "Y"
    graph = ir.Graph(inputs, [y], nodes=body.nodes, opset_imports={"": opset}, name=name)
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    function.doc_string = documentation(_FORMULA, signature.path, signature.slots, bank=signature.bank)
    return function


Taken = tuple[LayerSlot, ir.Value, Mapping[str, list[ir.Value]]]
"""A slot, its strength, and its tensors by part."""


def _moved(body: Body, x: ir.Value, slots: Sequence[Taken], rank: int, *, dense: bool) -> ir.Value:
    """`x + Σ s (T·x − x)`: at strength zero x itself, to the last bit."""
    moved = x
    for slot, strength, values in slots:
        if slot.transform is not None:
            turned = slot.transform.activations(body, x, rank, values["transform"], dense=dense)
            step = body.op("Mul", body.op("Sub", turned, x), strength)
            moved = body.op("Add", moved, step)
    return moved


def _added(body: Body, x: ir.Value, slots: Sequence[Taken], rank: int) -> ir.Value | None:
    """`Σ s Δ·x`."""
    added: ir.Value | None = None
    for slot, strength, values in slots:
        if slot.residual is not None:
            step = slot.residual.apply(body, x, rank, values["residual"], strength)
            added = step if added is None else body.op("Add", added, step)
    return added


def rebuilt(body: Body, weight: ir.Value, slots: Sequence[Taken]) -> ir.Value:
    """`W + Σ s (W' − W)`: at strength zero W itself, to the last bit."""
    rebuilt = weight
    for slot, strength, values in slots:
        change = weight_change(body, weight, slot, values)
        if change is not None:
            rebuilt = body.op("Add", rebuilt, body.op("Mul", change, strength))
    return rebuilt


def gained(body: Body, bias: ir.Value, slots: Sequence[Taken]) -> ir.Value:
    """`B + Σ s (G·B − B)` over the adapters that scale the bias."""
    gained = bias
    for slot, strength, values in slots:
        if slot.magnitude is not None and slot.magnitude.scales_bias:
            gain = slot.magnitude.bias_gain(body, values["magnitude"])
            change = body.op("Sub", body.op("Mul", gain, bias), bias)
            gained = body.op("Add", gained, body.op("Mul", change, strength))
    return gained


_FORMULA = "Y = X W'^T + B with W' = W (I + sum_k s_k (T_k - I)) + sum_k s_k Delta_k."


def documentation(formula: str, path: Path, slots: Sequence[LayerSlot], *, bank: bool = False) -> str:
    """What a function says of itself."""
    lines = [formula, f"Path: {path}."]
    if bank:
        lines.append(
            f"Every sample has the adapter at {INDEX} (batch,) int64 of the stack; the shapes below are one adapter's."
        )
    for number, slot in enumerate(slots):
        lines.append(f"Adapter {number}: {STRENGTH}_{number} ({'batch' if bank else 1},) float32")
        for part, op in slot.parts.items():
            shapes = ", ".join(f"{name} {shape}" for name, shape in op.shapes.items())
            lines.append(f"  {part} {op.type}: {shapes}, float32")
    return "\n".join(lines)
