"""Is a saved ONNX model whole, and what it should be?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from trexport.errors import ArtifactError, ExportError
from trexport.io_spec import ModelSpec, TensorDtype, TensorSpec

_ONNX_DTYPES: dict[TensorDtype, int] = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
}


def check_model(path: Path, spec: ModelSpec, parameters: Iterable[str]) -> None:
    """Raise `ExportError` unless the file passes `onnx.checker`, has the inputs and outputs of `spec`, and holds every
    parameter under its PyTorch name."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: onnx.checker refuses it: {error}") from error
    graph = onnx.load(path, load_external_data=False).graph
    held = {initializer.name for initializer in graph.initializer}
    for kind, values, expected in (("input", graph.input, spec.inputs), ("output", graph.output, spec.outputs)):
        found = [_describe(value) for value in values if value.name not in held]  # less overridable initialisers
        wanted = [(tensor.name, _ONNX_DTYPES[tensor.dtype], tensor.axes) for tensor in expected]
        if found != wanted:
            raise ExportError(f"{path.name}: {kind}s are {found}, expected {wanted}")
    missing = [name for name in parameters if name not in held]
    if missing:
        raise ExportError(f"{path.name}: {len(missing)} parameters are not among the initialisers, {missing[0]} first")


def load_graph(path: Path) -> onnx.ModelProto:
    """The model without its external data.

    Raises:
        ArtifactError: no ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public home; any failure to parse means the same
        raise ArtifactError(f"{path}: no ONNX model, or a damaged one ({type(error).__name__}: {error})") from error
    if not model.graph.output:
        raise ArtifactError(f"{path}: an ONNX model without outputs, expected a whole one")
    return model


def spec_of_graph(model: onnx.ModelProto) -> ModelSpec:
    """The inputs and outputs of an ONNX model; dtypes that `TensorSpec` does not know count as fp32."""
    short: dict[int, TensorDtype] = {number: dtype for dtype, number in _ONNX_DTYPES.items()}
    initializers = {initializer.name for initializer in model.graph.initializer}

    def read(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
        described = [_describe(value) for value in values if value.name not in initializers]
        return tuple(TensorSpec(name, short.get(dtype, "fp32"), axes) for name, dtype, axes in described)

    return ModelSpec(read(model.graph.input), read(model.graph.output))


def _describe(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    axes = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
    return value.name, tensor.elem_type, axes
