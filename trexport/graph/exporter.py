"""torch's ONNX exporter, and what is made of its graph before it is saved: shared by the UNet and the other models."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from trexport.errors import ExportError
from trexport.graph.passes.fold import fold
from trexport.graph.passes.metadata import metadata
from trexport.graph.passes.permutation import permutation
from trexport.graph.passes.promote import promote
from trexport.io_spec import ModelSpec
from trexport.manifest import MODEL_NAME

DATA_NAME = "model.onnx_data"


def run_exporter(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    spec: ModelSpec,
    dynamic_shapes: Any,
    opset: int,
) -> torch.onnx.ONNXProgram:
    """The exporter's program, not optimised.

    Raises:
        ExportError: the exporter failed; its reason is the message.
    """
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                model,
                args,
                kwargs=dict(kwargs),
                dynamo=True,
                opset_version=opset,
                optimize=False,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=dynamic_shapes,
                custom_translation_table={operator.floordiv: _floor_div},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            told = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Refer to")]
            reason = told[-1] if told else type(error).__name__
            raise ExportError(f"torch's ONNX exporter failed: {reason}") from error
    assert program is not None
    return program


def _floor_div(dividend: Any, divisor: Any) -> Any:
    """Python's `//` of sizes. The exporter's own is ONNX's `Div`, which rounds towards zero: wrong for the negative numbers
    that torch's rewriting of sizes comes to, (12 − h) // 2 as 6 + (−h) // 2 for instance."""
    import onnxscript

    op: Any = onnxscript.opset18
    return op.Div(op.Sub(dividend, op.Mod(dividend, divisor)), divisor)


def tidy(program: torch.onnx.ONNXProgram, spec: ModelSpec, parameters: Set[str], name: str) -> ir.Model:
    """The program's graph folded, without what the exporter writes beside it, its axes called as in `spec`."""
    graph = permutation(promote(program.model))
    fold(graph, set(parameters))
    metadata(graph)
    for value, tensor in zip([*graph.graph.inputs, *graph.graph.outputs], [*spec.inputs, *spec.outputs], strict=True):
        value.shape = ir.Shape(tensor.axes)  # axes by name, where the exporter writes expressions such as 8*h
    graph.graph.name = name
    graph.producer_name = "trexport"
    graph.producer_version = None
    return graph


def save_graph(graph: ir.Model, folder: Path, advance: Callable[[int], None]) -> None:
    """Write `model.onnx` with its weights beside it in `model.onnx_data`; `advance` is told of every tensor's bytes."""

    def report(tensor: ir.TensorProtocol, info: Any) -> None:
        advance(tensor.nbytes)

    ir.save(graph, folder / MODEL_NAME, external_data=DATA_NAME, size_threshold_bytes=1024, callback=report)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings about its own internals from the user; its errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
