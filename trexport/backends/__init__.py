"""Backends: what runs a UNet. A new one is one file here, one line in `BACKENDS`, one factory in the tests."""

from __future__ import annotations

from trexport.backends.aotinductor import AotInductor
from trexport.backends.base import AbstractBackend as AbstractBackend
from trexport.backends.base import Availability as Availability
from trexport.backends.base import Device as Device
from trexport.backends.base import EngineBackend as EngineBackend
from trexport.backends.base import EngineFile as EngineFile
from trexport.backends.base import EngineOptions as EngineOptions
from trexport.backends.base import EngineRecord as EngineRecord
from trexport.backends.base import OnnxFile as OnnxFile
from trexport.backends.base import Runner as Runner
from trexport.backends.base import Source as Source
from trexport.backends.base import Step as Step
from trexport.backends.base import TorchModel as TorchModel
from trexport.backends.onnxruntime import OnnxRuntime
from trexport.backends.tensorrt import TensorRt
from trexport.backends.tensorrt_rtx import TensorRtRtx
from trexport.backends.torch import TorchCompile, TorchEager
from trexport.errors import MissingError, UsageError
from trlora.errors import nearest

BACKENDS: dict[str, AbstractBackend] = {
    backend.name: backend
    for backend in (TorchEager(), TorchCompile(), OnnxRuntime(), AotInductor(), TensorRt(), TensorRtRtx())
}


def backend_of(name: str) -> AbstractBackend:
    """The backend called `name`. Raises `UsageError` for an unknown one."""
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}, expected one of {sorted(BACKENDS)}{nearest(name, BACKENDS)}")
    return BACKENDS[name]


def engine_backend_of(name: str) -> EngineBackend:
    """The backend called `name`, one that builds engines. Raises `UsageError` for another."""
    builders = {key: backend for key, backend in BACKENDS.items() if isinstance(backend, EngineBackend)}
    if name not in builders:
        raise UsageError(f"{name!r} builds no engines, expected one of {sorted(builders)}{nearest(name, builders)}")
    return builders[name]


def device_of(name: str) -> Device:
    """`auto` is CUDA where torch sees one, the CPU otherwise.

    Raises:
        UsageError: another name.
        MissingError: CUDA is asked for and not here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            f"torch {torch.__version__} sees no CUDA device; use --device cpu, or install torch for CUDA"
        )
    if name == "cpu" or name == "cuda":
        return name
    raise UsageError(f"unknown device {name!r}, expected auto, cpu or cuda")
