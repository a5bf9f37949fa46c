"""Overridable initialisers into required inputs."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from trexport.errors import ExportError


def required(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Take the defaults of some inputs away, so that they have to be fed; in place. TensorRT's parsers make a constant of an
    input that has a value.

    Raises:
        ExportError: an initialiser that is not there, or that is no graph input.
    """
    inputs = {value.name for value in model.graph.inputs}
    for name in names:
        if name not in model.graph.initializers or name not in inputs:
            raise ExportError(f"{name}: no overridable initialiser of the graph; export again")
        value = model.graph.initializers.pop(name)
        value.const_value = None
    return model
