"""An engine from an ONNX graph."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trexport.backends.base import BuildReport, EngineOptions, OnnxFile
from trexport.backends.trt.log import monitor, quiet_logger
from trexport.backends.trt.report import layers_of_inspection, layers_of_network
from trexport.errors import ExportError
from trexport.models.float32 import is_float32
from trexport.profile import Profile
from trexport.progress import Progress
from trlora.files import atomic_file


def build(trt: Any, source: OnnxFile, path: Path, options: EngineOptions, progress: Progress) -> BuildReport:
    """Build a strongly typed engine: precisions are the graph's own.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        source: the graph, its `constants` among the inputs.
        path: of the engine.

    Raises:
        ExportError: the parser or the builder refuses it; its own words are in the message.
    """
    start = time.perf_counter()
    logger = quiet_logger(trt)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    graph = source.graph if source.graph is not None else source.path.read_bytes()
    if not parser.parse(graph, str(source.path)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ExportError(f"{trt.__name__} {trt.__version__} does not take the graph: {_first(errors, logger)}")
    config = _config(trt, builder, network, source, options)
    watcher = monitor(trt, progress)
    config.progress_monitor = watcher
    try:
        serialized = builder.build_serialized_network(network, config)
    finally:
        watcher.close()
    if watcher.raised is not None:
        raise watcher.raised
    if serialized is None:
        hint = ""
        words = " ".join(logger.errors)
        if "FP32 GEMM is not supported" in words:
            hint = (
                "; sm75 computes products in half precision only: export with --dtype fp16, or build for sm80 and newer"
            )
        elif "OutOfMemory" in words:
            hint = "; give a greater --workspace"
        raise ExportError(f"{trt.__name__} {trt.__version__} does not build the engine: {_first([], logger)}{hint}")
    with path.open("wb") as stream:
        stream.write(memoryview(serialized))
    if options.timing_cache is not None:
        with atomic_file(options.timing_cache) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    seconds = time.perf_counter() - start
    size = path.stat().st_size
    engine = _loaded(trt, serialized, logger)
    if engine is None:
        return BuildReport(
            seconds,
            size,
            layers=layers_of_network(network),
            note="these are the network's layers; which of them the engine fuses, its inspector tells, on a GPU it is for",
        )
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return BuildReport(seconds, size, engine.device_memory_size_v2, layers_of_inspection(text))


def add_profile(builder: Any, config: Any, network: Any, source: OnnxFile, profile: Profile) -> None:
    """An optimisation profile: the least, usual and greatest shape of every input that has a free axis.

    Raises:
        ExportError: the builder refuses the shapes.
    """
    made = builder.create_optimization_profile()
    by_name = {tensor.name: tensor for tensor in source.spec.inputs}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name in by_name and -1 in tuple(tensor.shape):
            made.set_shape(tensor.name, *profile.shapes(by_name[tensor.name]))
    if config.add_optimization_profile(made) < 0:
        raise ExportError(f"the builder refuses the profile {profile}")


def _config(trt: Any, builder: Any, network: Any, source: OnnxFile, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    for profile in options.profiles:
        add_profile(builder, config, network, source, profile)
    # without it the inspector tells names only
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.hardware_compatible is not None:
        level = options.hardware_compatible.upper().replace("-", "_")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    for name in flags_of(options):
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in cleared_flags(source):
        config.clear_flag(getattr(trt.BuilderFlag, name))
    if options.timing_cache is not None:
        stored = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        # a cache of another GPU or version is refused by the builder, and a new one begun
        if not config.set_timing_cache(config.create_timing_cache(stored), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
    if options.targets and hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    return config


def flags_of(options: EngineOptions) -> list[str]:
    """The builder's flags, by their names in `BuilderFlag`."""
    flags = []
    if options.version_compatible:
        flags.append("VERSION_COMPATIBLE")
    if options.refit is not None:
        flags.append({"all": "REFIT", "identical": "REFIT_IDENTICAL"}[options.refit])
    if options.strip:
        flags.append("STRIP_PLAN")
    return flags


def cleared_flags(source: OnnxFile) -> list[str]:
    """Those that the builder sets of itself: a model in float32 is to be computed in float32."""
    return ["TF32"] if is_float32(source.spec) else []


def _loaded(trt: Any, serialized: Any, logger: Any) -> Any:
    """The engine, where this machine has a GPU that it is for; None otherwise."""
    import torch

    return trt.Runtime(logger).deserialize_cuda_engine(serialized) if torch.cuda.is_available() else None


def _first(errors: list[str], logger: Any) -> str:
    found = [*errors, *logger.errors] or logger.warnings[-1:] or ["it gives no reason"]
    return found[0].strip()
