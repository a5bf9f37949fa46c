"""An exported graph as engine builders want it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from trexport.graph.passes.attention import attention
from trexport.graph.passes.islands import islands
from trexport.graph.passes.required import required


def engine_graph(path: Path, inputs: Iterable[str] = ()) -> bytes:
    """The graph of an exported model, its weights left where they are, beside `path`: attention written out, normalisations
    in float32, and adapters' inputs without defaults.

    Args:
        inputs: overridable initialisers that the engine shall take as inputs.

    Raises:
        ExportError: the graph is not one that trexport wrote.
    """
    model = ir.load(path)
    required(model, inputs)
    attention(model)
    common.ShapeInferencePass()(model)  # torch's exporter leaves some values without a type
    islands(model)
    return ir.serde.serialize_model(model).SerializeToString()
