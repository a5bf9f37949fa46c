"""Group normalisations, with the SiLU after them, into ONNX Runtime's `GroupNorm`, which takes channels last."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from trexport.graph.matching import MICROSOFT, constant, dims, finish, integers, is_op, made_by, op, replace
from trexport.graph.passes.transposes import TO_FIRST, TO_LAST

_GREATEST = 512
"""Channels of a group: what a block of the CUDA kernel takes (`kMaxSize` of its group_norm_common_base.h)."""
_AT_ONCE = 2
"""Channels that a thread reads; a group has a multiple of them."""


class _Site(NamedTuple):
    x: ir.Value
    gamma: ir.Value
    beta: ir.Value
    groups: int
    epsilon: float


def group_norm(model: ir.Model) -> int:
    """Replace group normalisation of (N, C, H, W), as `GroupNormalization` of opset 21 or as the exporter writes it before,
    by `com.microsoft.GroupNorm` between two transposes; `x · sigmoid(x)` after it becomes its activation; in place. Returns
    how many. Left alone is what the CUDA kernel does not take: groups of an odd number of channels, or of more than 512.
    """
    sites = 0
    for node in list(model.graph):
        site = (
            _operator(node) if is_op(node, "GroupNormalization") else _written_out(node) if is_op(node, "Add") else None
        )
        sizes = None if site is None else dims(site.x)
        if site is None or sizes is None or len(sizes) != 4 or not _is_taken(sizes[1], site.groups):
            continue
        silu = _silu(node.outputs[0])
        last = [sizes[axis] for axis in TO_LAST]
        turned = op("Transpose", [site.x], {"perm": TO_LAST}, like=site.x, shape=last)
        casts, wide = [], []
        for value in (site.gamma, site.beta):
            if value.dtype != ir.DataType.FLOAT:
                casts.append(op("Cast", [value], {"to": int(ir.DataType.FLOAT)}, like=value))
                casts[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            wide.append(value if value.dtype == ir.DataType.FLOAT else casts[-1].outputs[0])
        attributes = {
            "groups": site.groups,
            "epsilon": site.epsilon,
            "activation": 0 if silu is None else 1,
            "channels_last": 1,
        }
        inputs = [turned.outputs[0], *wide]
        norm = op("GroupNorm", inputs, attributes, like=turned.outputs[0], domain=MICROSOFT)
        norm.metadata_props.update(node.metadata_props)
        result = node.outputs[0] if silu is None else silu
        back = op("Transpose", norm.outputs, {"perm": TO_FIRST}, like=norm.outputs[0], shape=sizes)
        norm.outputs[0].type = back.outputs[0].type = turned.outputs[0].type
        replace(model.graph, result, [turned, *casts, norm, back])
        sites += 1
    return finish(model, sites)


def _is_taken(channels: int | str, groups: int) -> bool:
    if not isinstance(channels, int) or channels % groups:
        return False
    of_group = channels // groups
    return of_group % _AT_ONCE == 0 and of_group <= _GREATEST


def _operator(node: ir.Node) -> _Site | None:
    x, gamma, beta = node.inputs
    if x is None or gamma is None or beta is None or dims(gamma) != (dims(x) or [None, None])[1:2]:
        return None  # up to opset 20 its scale was one for each group
    groups = node.attributes["num_groups"].as_int()
    return _Site(x, gamma, beta, groups, node.attributes.get_float("epsilon", 1e-5))


def _written_out(node: ir.Node) -> _Site | None:
    """`instance_norm(x as (N, groups, ·)) as x · gamma + beta`."""
    for beta, scaled in (node.inputs, node.inputs[::-1]):
        product = made_by(scaled, "Mul")
        if product is None:
            continue
        for gamma, restored in (product.inputs, product.inputs[::-1]):
            found = _instance(restored)
            rows = _row(gamma), _row(beta)
            if found is not None and rows[0] is not None and rows[1] is not None:
                return _Site(found[0], rows[0], rows[1], found[1], found[2])
    return None


def _instance(value: ir.Value | None) -> tuple[ir.Value, int, float] | None:
    """What an instance normalisation over groups of channels, back in its shape, is of; the groups, and epsilon."""
    back = made_by(value, "Reshape")
    norm = None if back is None else made_by(back.inputs[0], "InstanceNormalization")
    view = None if norm is None else made_by(norm.inputs[0], "Reshape")
    if back is None or norm is None or view is None or view.inputs[0] is None:
        return None
    x, shape = view.inputs[0], integers(view.inputs[1])
    scale, shift = constant(norm.inputs[1]), constant(norm.inputs[2])
    if shape is None or len(shape) != 3 or shape[0] != 0 or shape[2] != -1 or scale is None or shift is None:
        return None
    if not (np.all(scale == 1) and np.all(shift == 0)):
        return None
    of = made_by(back.inputs[1], "Shape")
    as_before = of is not None and of.inputs[0] is x and not of.attributes.get_int("start", 0)
    if not as_before and (integers(back.inputs[1]) is None or integers(back.inputs[1]) != dims(x)):
        return None
    return x, shape[1], norm.attributes.get_float("epsilon", 1e-5)


def _row(value: ir.Value | None) -> ir.Value | None:
    """The vector over channels that is here for (C, 1, 1)."""
    cast = made_by(value, "CastLike")
    value = value if cast is None else cast.inputs[0]
    node = made_by(value, "Unsqueeze")
    if node is None or integers(node.inputs[1]) != [1, 2] or len(dims(node.inputs[0]) or []) != 1:
        return None
    return node.inputs[0]


def _silu(value: ir.Value) -> ir.Value | None:
    """`value · sigmoid(value)`, where nothing else reads the value."""
    users = {use.node for use in value.uses()}
    sigmoid = next((node for node in users if is_op(node, "Sigmoid")), None)
    if sigmoid is None or len(users) != 2 or value.is_graph_output():
        return None
    (product,) = users - {sigmoid}
    if not is_op(product, "Mul") or set(product.inputs) != {value, sigmoid.outputs[0]}:
        return None
    return product.outputs[0] if len(sigmoid.outputs[0].uses()) == 1 else None
