"""A function of tensors as a flat program of torch's operators: nothing of autograd, `torch.vmap` and modules is left for
the host to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The program of a function, without what its result does not need.

    Args:
        function: of tensors; which operators it uses may depend on their shapes and dtypes, not on their values.
        inputs: to trace it with. The program takes others of the same shapes, dtypes and devices.
    """
    program = make_fx(function)(*inputs)
    for node in list(program.graph.nodes):
        _shorten(node)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _shorten(node: fx.Node) -> None:
    """Views cost the host nearly as much as a kernel: those that change nothing go, and of two in a row the first one."""
    if node.target not in (*_VIEWS, _ATEN.expand.default):
        return
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target in _VIEWS and source.target in _VIEWS:
        source = source.args[0]
        assert isinstance(source, fx.Node)
        node.args = (source, *node.args[1:])
    if _shape(node) == _shape(source):
        node.replace_all_uses_with(source)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)
