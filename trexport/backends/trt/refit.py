"""Other weights into a built engine. Written to the API of the installed bindings; not executed on our GPUs, see README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trexport.backends.trt.log import quiet_logger
from trexport.errors import ArtifactError, ExportError
from trlora.errors import nearest


def refit(trt: Any, data: bytes, weights: Mapping[str, Tensor], onnx: Path | None, graph: bytes | None) -> bytes:
    """An engine with other weights, serialised so that it can be refitted again.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        data: the engine.
        weights: by parameter name, on the CPU, in the engine's dtype.
        onnx: a model to take every weight from first, for an engine that was built without them.
        graph: that model's graph as the engine was built from it; external data lie beside `onnx`.

    Raises:
        ArtifactError: the runtime does not load the engine.
        ExportError: a weight that the engine does not offer, of another size, or one that would be missing.
    """
    logger = quiet_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ArtifactError(f"{trt.__name__} {trt.__version__} does not load the engine: {_reason(logger)}")
    refitter = trt.Refitter(engine, logger)
    if onnx is not None and graph is not None:
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_bytes(graph, str(onnx)):
            raise ExportError(f"{onnx}: its weights do not go into the engine: {_reason(logger)}")
    check_names(weights, refitter.get_all_weights())
    for name, tensor in weights.items():
        prototype = refitter.get_weights_prototype(name)
        if prototype.size != tensor.numel():
            raise ExportError(f"{name}: {tensor.numel()} values given, the engine holds {prototype.size}")
        given = trt.Weights(prototype.dtype, tensor.data_ptr(), tensor.numel())
        if not refitter.set_named_weights(name, given, trt.TensorLocation.HOST):
            raise ExportError(f"{name}: the engine refuses it: {_reason(logger)}")
    missing = refitter.get_missing_weights()
    if missing:
        raise ExportError(f"{len(missing)} more weights have to be given with these, {missing[0]} first")
    if not refitter.refit_cuda_engine():
        raise ExportError(f"the engine does not take the weights: {_reason(logger)}")
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(engine.serialize_with_config(config))


def check_names(wanted: Iterable[str], offered: Iterable[str]) -> None:
    """Raise `ExportError` for a weight that an engine does not offer. Parsers name weights as the graph's initialisers,
    which are PyTorch's parameters: no map is needed."""
    known = list(offered)
    missing = [name for name in wanted if name not in set(known)]
    if missing:
        raise ExportError(
            f"{len(missing)} weights are not among the {len(known)} that the engine offers, {missing[0]} first"
            f"{nearest(missing[0], known)}; build it with --refit from an artifact of trexport onnx"
        )


def _reason(logger: Any) -> str:
    return logger.errors[0] if logger.errors else "it gives no reason"
