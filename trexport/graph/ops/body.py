"""Writing the body of an ONNX function, node by node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import onnx_ir as ir

from trexport.io_spec import Dtype

ONNX_DTYPES: dict[Dtype, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}


@final
class Body:
    """The nodes of a function under construction. Cores and strengths are float32; `narrow` casts what meets activations
    or weights to the model's precision.

    In a `stacked` body cores have a leading axis, of as many adapters as are fed: one a sample, or several to be summed.
    `turn` and `fold` take the orders and shapes of one adapter and leave that axis alone.
    """

    def __init__(self, dtype: Dtype, *, stacked: bool = False) -> None:
        self.dtype: Dtype = dtype
        self.stacked = stacked
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int | str | Sequence[int]) -> ir.Value:
        """One plain node with one output."""
        output = ir.val(f"v{len(self.nodes)}")
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output]))
        return output

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant vector of int64."""
        return self.op("Constant", value_ints=list(values))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """As `Reshape`: 0 keeps a dimension, -1 is computed."""
        return self.op("Reshape", value, self.ints(shape))

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        return value if list(order) == sorted(order) else self.op("Transpose", value, perm=list(order))

    def turn(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """`transpose` of something made from cores."""
        return self.transpose(value, [0, *(axis + 1 for axis in order)] if self.stacked else order)

    def fold(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`reshape` of something made from cores."""
        return self.reshape(value, [0, *shape] if self.stacked else shape)

    def matmul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.op("MatMul", a, b)

    def narrow(self, value: ir.Value) -> ir.Value:
        """From float32 to the model's precision."""
        return value if self.dtype == "fp32" else self.op("Cast", value, to=int(ONNX_DTYPES[self.dtype]))

    def widen(self, value: ir.Value) -> ir.Value:
        """From the model's precision to float32."""
        return value if self.dtype == "fp32" else self.op("Cast", value, to=int(ir.DataType.FLOAT))

    def chain(
        self, cores: Sequence[ir.Value], shapes: Sequence[Sequence[int]], order: Sequence[str]
    ) -> tuple[ir.Value, dict[str, int]]:
        """The open product of neighbouring cores, its axes gathered as wanted.

        Args:
            cores: values of shape `(I_d, R_d, R_{d+1})` or `(I_d, J_d, R_d, R_{d+1})`, whose `shapes` are given.
            order: the axes of the result, of `i` (rows), `j` (columns), `a` (first rank), `b` (last rank); the leading axis
                of a stacked body stays in front.

        Returns:
            A four- (three-) dimensional value with the axes in that order, and the size of each. Rows and columns are
            little-endian: the first core's index runs fastest.
        """
        axes = "ijab" if len(shapes[0]) == 4 else "iab"
        value, sizes = cores[0], dict(zip(axes, shapes[0], strict=True))
        for number, (core, shape) in enumerate(zip(cores[1:], shapes[1:], strict=True), start=1):
            last = number == len(cores) - 1
            modes, (inner, following) = list(shape[:-2]), shape[-2:]
            # (old modes…, a, inner) · (inner, new modes…, b) as one product of matrices
            outer = [sizes[axis] for axis in axes[:-1]]
            turned = self.turn(core, [len(modes), *range(len(modes)), len(modes) + 1])
            flat = self.fold(turned, [inner, math.prod(modes) * following])
            met = self.matmul(self.fold(value, [math.prod(outer), inner]), flat)
            met = self.fold(met, [*outer, *modes, following])
            # each new mode goes before the old one of its kind, for it is the slower
            place = {"a": [len(modes)], "b": [2 * len(modes) + 1]}
            place |= {axis: [len(modes) + 1 + n, n] for n, axis in enumerate("ij"[: len(modes)])}
            for n, axis in enumerate("ij"[: len(modes)]):
                sizes[axis] *= modes[n]
            sizes["b"] = following
            wanted = list(order) if last else list(axes)
            met = self.turn(met, [position for axis in wanted for position in place[axis]])
            value = self.fold(met, [sizes[axis] for axis in wanted])
        if len(cores) == 1:
            value = self.turn(value, [axes.index(axis) for axis in order])
        return value, sizes


def batched(rank: int, tail: Sequence[int]) -> list[int]:
    """The shape for `Reshape` that keeps all but the last two of `rank` dimensions, and ends in `tail`; a -1 goes where the
    last kept one is to take up the rest."""
    return [*([0] * (rank - 2)), -1, *tail]
