"""What torch's exporter made lately, kept without weights: the next model of the same structure starts from it.

A graph depends on structure and shapes, never on the values of weights, and tracing it is nearly all the time of an export.
So the second adapter on a base, or its second form, costs what writing its weights costs.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trexport.graph.exporter import run_exporter, tidy
from trexport.hashing import hash_of_bytes
from trexport.io_spec import ModelSpec
from trexport.models.writer import bytes_of

_KEPT = 8
"""Graphs; one of a few thousand nodes takes some tens of megabytes."""
_latest: OrderedDict[str, ir.Model] = OrderedDict()


def traced_graph(
    model: nn.Module,
    config: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    spec: ModelSpec,
    dynamic_shapes: Any,
    opset: int,
    name: str,
) -> ir.Model:
    """The model's graph, tidied (see `tidy`), its own to change, with the model's tensors as initialisers.

    Args:
        model: as `load_model` or `load_component` makes it: with `config` its class says all that it computes.

    Raises:
        ExportError: the exporter failed; its reason is the message.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    key = _key(model, config, (args, kwargs), spec, dynamic_shapes, opset, name)
    graph = _latest.pop(key, None)
    if graph is None:
        program = run_exporter(model, args, kwargs, spec, dynamic_shapes, opset)
        graph = tidy(program, spec, {name for name, _ in model.named_parameters()}, name)
        _strip_(graph, tensors)
    _latest[key] = graph
    while len(_latest) > _KEPT:
        _latest.popitem(last=False)
    own = graph.clone()
    for value in own.graph.initializers.values():
        if value.name in tensors:
            value.const_value = TorchTensor(tensors[value.name].detach(), name=value.name)
    return own


def _key(model: nn.Module, config: Mapping[str, Any], arguments: Any, spec: ModelSpec, *others: Any) -> str:
    """Of all that the graph depends on. Buffers count by value: what is computed from them alone is folded."""
    fields = [
        type(model).__qualname__,
        str(model),
        json.dumps(dict(config), sort_keys=True, default=str),
        [(name, str(p.dtype), list(p.shape)) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, str(b.dtype), list(b.shape), hash_of_bytes(bytes_of(b.cpu()))) for name, b in model.named_buffers()],
        [(str(value.dtype), list(value.shape)) if isinstance(value, Tensor) else repr(value)
         for value in pytree.tree_leaves(arguments)],
        spec.to_dict(),
        [repr(other) for other in others],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _strip_(graph: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Let go of the weights, and of the torch graph that the exporter leaves a way to."""
    for value in graph.graph.initializers.values():
        if value.name in tensors:
            value.const_value = None
    for node in graph.graph.all_nodes():
        node.meta.clear()
        for value in node.outputs:
            value.meta.clear()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.meta.clear()
    graph.meta.clear()
    graph.graph.meta.clear()
