"""`trexport bench`: backends side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, final

import torch

from trexport.backends import BACKENDS, Device, EngineFile, OnnxFile, Source, Step, TorchModel, backend_of
from trexport.bench.environment import environment
from trexport.bench.memory import PeakMemory
from trexport.bench.report import BackendResult, BenchReport
from trexport.bench.roofline import measure_ceiling, work_of
from trexport.bench.stats import Latency
from trexport.bench.timer import time_steps
from trexport.errors import MissingError, UsageError
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, Dtype, ModelSpec
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import default_sizes
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.progress import SILENT, Progress


@final
@dataclass(frozen=True)
class BenchOptions:
    """What to measure."""

    backends: Sequence[str] = tuple(BACKENDS)
    dtype: Dtype = "fp32"
    sizes: Mapping[str, int] | None = None
    """None for the model's own."""
    warm_up: int = 3
    iterations: int = 20
    skip_missing: bool = True
    """Report a backend that is not here as skipped, instead of failing."""


def bench(
    base: Base,
    adapters: Sequence[BoundAdapter],
    onnx: Mapping[str, OnnxFile],
    device: Device,
    options: BenchOptions | None = None,
    *,
    engines: Mapping[str, EngineFile] | None = None,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure one step in every backend, interleaved in one run: adapters merged in torch, exported models as they are.

    All models are loaded at once; on CUDA each step is a CUDA graph on resident buffers. A bank draws every sample with the
    first adapter, and is compared with that one's step.

    Args:
        onnx: exported models by what to call them, for the backends that take one; a single one may be called ``. With a
            graph of their own where a session has one.
        engines: built engines, by what to call each; their own backends run them.

    Raises:
        MissingError: no backend could run, or one could not and `skip_missing` is off.
    """
    options = options or BenchOptions()
    engines = engines or {}
    chosen = base.architecture.sizes(options.sizes or {})
    sizes = default_sizes(base.config) | _fixed({**onnx, **engines}) | chosen
    spec = base.architecture.spec(options.dtype)
    feeds = random_feeds(spec, sizes, seed=0)
    reference = _reference(base, adapters, feeds, spec, device)
    alone = reference
    ceiling = measure_ceiling(device, options.dtype)
    work = work_of(base, spec, sizes, options.dtype)
    least_ms = ceiling.least_ms(work)
    steps: dict[str, Step] = {}
    loaded: dict[str, tuple[float, int]] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        sources: dict[str, tuple[str, Source]] = {}
        for name in options.backends:
            if backend_of(name).consumes is TorchModel:
                sources[name] = (name, TorchModel(base, adapters, options.dtype))
            elif backend_of(name).consumes is EngineFile:
                own = {label: file for label, file in engines.items() if file.record.backend == name}
                sources |= {label: (name, _for_batch(file, sizes["batch_size"])) for label, file in own.items()}
                if not own:
                    skipped[name] = "needs an engine: give an artifact of trexport engine"
            elif not onnx:
                skipped[name] = "needs an exported model: give an artifact of trexport onnx"
            for label, file in onnx.items() if backend_of(name).consumes is OnnxFile else ():
                sources[f"{name}, {label}" if label else name] = (name, _for_batch(file, sizes["batch_size"]))
        banks = {
            name
            for name, (_, source) in sources.items()
            if not isinstance(source, TorchModel) and ADAPTER_INDEX in source.constants
        }
        if banks and len(adapters) > 1:
            alone = _reference(base, adapters[:1], feeds, spec, device)
        for name, (backend, source) in sources.items():
            try:
                with progress.task(f"load {name}"), PeakMemory(device) as memory:
                    start = time.perf_counter()
                    steps[name] = stack.enter_context(backend_of(backend).load(source, device)).step(feeds)
                    steps[name].run()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    loaded[name] = (time.perf_counter() - start, 0)
                loaded[name] = (loaded[name][0], memory.bytes)
            except MissingError as error:
                if not options.skip_missing:
                    raise
                skipped[name] = str(error)
        if not steps:
            raise MissingError("no backend can run here: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
        latencies = time_steps(steps, device, warm_up=options.warm_up, iterations=options.iterations, progress=progress)
        first = next(iter(steps))
        results = []
        for name, values in latencies.items():
            latency = Latency.of(values)
            results.append(
                BackendResult(
                    backend=name,
                    latency=latency,
                    ratio=latency.median_ms / Latency.of(latencies[first]).median_ms,
                    roofline_share=least_ms / latency.median_ms,
                    load_seconds=loaded[name][0],
                    peak_memory_bytes=loaded[name][1],
                    relative_l2=relative_l2(_output(steps[name], spec), alone if name in banks else reference),
                    note=steps[name].note,
                )
            )
    return BenchReport(
        model=Path(base.name).name if base.folder is not None else base.name,
        adapters=[f"{Path(adapter.name).name}={adapter.strength:g}" for adapter in adapters],
        dtype=options.dtype,
        sizes=sizes,
        results=results,
        work=work,
        ceiling=ceiling,
        least_ms=least_ms,
        environment=environment(device),
        skipped=skipped,
    )


def _fixed(onnx: Mapping[str, OnnxFile | EngineFile]) -> dict[str, int]:
    """The sizes that exported models fix. Raises `UsageError` where they fix others."""
    fixed: dict[str, int] = {}
    for label, file in onnx.items():
        own = file.spec.fixed_sizes()
        if isinstance(file, EngineFile) and len(file.record.profiles) == 1:
            own |= file.record.profiles[0].fixed
        for axis, size in own.items():
            if fixed.setdefault(axis, size) != size:
                raise UsageError(f"{label}: {axis} is fixed at {size}, another artifact fixes it at {fixed[axis]}")
    return fixed


_File = TypeVar("_File", OnnxFile, EngineFile)


def _for_batch(file: _File, batch: int) -> _File:
    """A bank's index and strength, where they are one for all samples, for so many."""
    chosen = {
        name: tensor.expand(batch).contiguous()
        for name, tensor in file.constants.items()
        if name in (ADAPTER_INDEX, ADAPTER_STRENGTH)
    }
    return replace(file, constants={**file.constants, **chosen})


def _reference(
    base: Base, adapters: Sequence[BoundAdapter], feeds: Mapping[str, torch.Tensor], spec: ModelSpec, device: Device
) -> torch.Tensor:
    """The step in float32 by eager torch, of inputs as the others see them."""
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in feeds.items()}
    with backend_of("torch").load(TorchModel(base, adapters, "fp32"), device) as runner:
        return runner(wide)[spec.outputs[0].name].cpu()


def _output(step: Step, spec: ModelSpec) -> torch.Tensor:
    return step.outputs[spec.outputs[0].name].float().cpu()
