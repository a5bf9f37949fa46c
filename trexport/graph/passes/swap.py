"""Adapted weights into overridable initialisers: what a swappable graph is."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from trexport.errors import ExportError


def swap(model: ir.Model, paths: Iterable[str]) -> ir.Model:
    """Make the weights of some layers graph inputs that have a value, under their own names; in place.

    Raises:
        ExportError: a layer has no weight in the graph.
    """
    for path in paths:
        weight = model.graph.initializers.get(f"{path}.weight")
        if weight is None:
            raise ExportError(f"{path}: its weight is not in the graph; export it merged")
        model.graph.inputs.append(weight)
    return model
