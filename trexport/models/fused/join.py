"""What stands before a group normalisation goes into it, in an exported program: a residual's sum, a convolution's bias, a
concatenation.

In the modules these are apart: the sum ends one block, the normalisation begins the next. Inductor fuses nothing into a
kernel of ours, so each would be a pass over the map of its own (`trexport.models.fused.kernels.group_norm`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default
_CONTIGUOUS = torch.ops.aten.contiguous.default
_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv_transpose2d.input)


def join_norms_(program: ExportedProgram) -> Mapping[str, int]:
    """Give every `trexport::group_norm` what stands before it, unless it has a shift already.

    Returns:
        how many of each were joined: `residual`, `bias`, `concatenation`. Normalisations of torch's own operators are left
        to Inductor, which fuses them itself.
    """
    graph = program.graph_module.graph
    found: Counter[str] = Counter()
    for node in list(graph.nodes):
        # diffusers makes what comes out of a transformer contiguous; that would take it out of channels-last and back again
        if node.target is _CONTIGUOUS and len(node.args) == 1 and all(user.target is _ADD for user in node.users):
            node.replace_all_uses_with(node.args[0])
    for node in list(graph.nodes):
        if str(node.target) == "trexport.group_norm.default" and node.args[1] is None:
            _join(node, found)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return dict(found)


def _join(norm: fx.Node, found: Counter[str]) -> None:
    source: Any = norm.args[0]
    x, skip, shift, other = source, None, None, None
    if source.target is _CAT and len(source.args[0]) == 2 and source.args[1:] == (1,):
        x, other = source.args[0]
        found["concatenation"] += 1
    if x.target is _ADD and not x.kwargs and _alike(*x.args) and (x is source or _uses(x) == 1):
        x, skip = x.args
        found["residual"] += 1
    for convolution in (x, skip):
        if shift is None and convolution is not None and convolution.target in _CONVOLUTIONS:
            inputs = list(convolution.args)
            if len(inputs) > 2 and inputs[2] is not None and (convolution is source or _uses(convolution) == 1):
                shift, inputs[2] = inputs[2], None
                convolution.args = tuple(inputs)
                found["bias"] += 1
    if x is source and shift is None:
        return
    graph = norm.graph
    with graph.inserting_after(source):
        both = graph.call_function(
            torch.ops.trexport.joined_group_norm.default, (x, skip, shift, other, *norm.args[2:])
        )
    with graph.inserting_after(both):
        joined, out = (graph.call_function(operator.getitem, (both, n)) for n in (0, 1))
    joined.meta["val"], out.meta["val"] = source.meta["val"], norm.meta["val"]
    both.meta["val"] = (joined.meta["val"], out.meta["val"])
    source.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not both)
    norm.replace_all_uses_with(out)


def _uses(node: fx.Node) -> int:
    """How often a node is an input; `users` has one that takes it twice once."""
    inputs: list[fx.Node] = []
    for user in node.users:
        fx.map_arg((user.args, user.kwargs), inputs.append)
    return sum(taken is node for taken in inputs)


def _alike(x: Any, y: Any) -> bool:
    """Whether both are maps of one shape and dtype."""
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in (x, y)]
    first, second = values
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.dim() == 4
        and first.shape == second.shape
        and first.dtype == second.dtype
    )
