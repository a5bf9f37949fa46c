"""The backend of TensorRT and TensorRT-RTX, less what tells them apart."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trexport.backends.base import (
    Availability,
    BuildReport,
    Device,
    EngineBackend,
    EngineFile,
    EngineOptions,
    EngineRecord,
    OnnxFile,
    Runner,
    Source,
    TorchModel,
)
from trexport.backends.trt.build import build, cleared_flags, flags_of
from trexport.backends.trt.refit import refit
from trexport.backends.trt.runner import TensorRtRunner
from trexport.errors import MissingError, UsageError
from trexport.progress import SILENT, Progress


class TrtBackend(EngineBackend):
    """Built from ONNX. Subclasses say which module, for which GPUs, and what it cannot do."""

    builds_from: ClassVar[type[TorchModel] | type[OnnxFile]] = OnnxFile
    package: ClassVar[str]
    """Of the module."""
    install: ClassVar[str]
    """What to do where it is missing."""

    @abstractmethod
    def module(self) -> Any:
        """The imported module."""

    @abstractmethod
    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        """The GPUs to build for. Raises `UsageError` or `MissingError` where that cannot be."""

    @abstractmethod
    def refuse(self, options: EngineOptions) -> None:
        """Raise `UsageError` or `MissingError` for what this one cannot do."""

    @abstractmethod
    def runs_on(self, target: str) -> str | None:
        """Why it does not run on a GPU of some compute capability at all; None where it does."""

    def availability(self, device: Device) -> Availability:
        version = self._version()
        if version is None:
            return Availability(False, None, f"not installed; {self.install}")
        here = gpu_here()
        if here is None:
            return Availability(False, version, "runs on CUDA devices, and torch sees none")
        if device == "cpu":
            return Availability(False, version, "runs on CUDA devices; use --device cuda")
        reason = self.runs_on(here)
        return Availability(reason is None, version, reason)

    def check(self, options: EngineOptions, form: str) -> EngineOptions:
        if self._version() is None:
            raise MissingError(f"{self.name}: not installed; {self.install}")
        if options.refit is not None and form not in ("merged", "base"):
            raise UsageError(
                f"--refit goes with merged artifacts; a {form} one has its adapters as inputs, and needs none to change them"
            )
        if options.strip and options.refit is None:
            options = replace(options, refit="identical")  # what the stripped weights are put back by
        self.refuse(options)
        return replace(options, targets=self.targets(options))

    def build(
        self, source: TorchModel | OnnxFile, folder: Path, options: EngineOptions, *, progress: Progress = SILENT
    ) -> tuple[EngineRecord, BuildReport]:
        assert isinstance(source, OnnxFile)
        trt = self.module()
        report = build(trt, source, folder / self.file_name, options, progress)
        settings: dict[str, Any] = {
            "flags": flags_of(options),
            "cleared_flags": cleared_flags(source),
            "strip": options.strip,
            "builder_optimization_level": options.optimization_level,
            "workspace_bytes": options.workspace_bytes,
            "hardware_compatibility_level": options.hardware_compatible,
            "inputs": sorted(source.constants),
        }
        runtime = {self.package: trt.__version__}
        record = EngineRecord(self.name, self.file_name, runtime, options.targets, options.profiles, settings)
        return record, report

    def load(self, source: Source, device: Device) -> Runner:
        assert isinstance(source, EngineFile)
        available = self.availability(device)
        if not available.ok:
            raise MissingError(f"{self.name}: {available.reason}")
        ok, reason = self.loads_here(source.record)
        if not ok:
            raise MissingError(f"{self.name}: {reason}")
        return TensorRtRunner(self.module(), source)

    def refit(
        self, source: EngineFile, weights: Mapping[str, Tensor], onnx: Path | None = None, graph: bytes | None = None
    ) -> bytes:
        available = self.availability("cuda")
        if not available.ok:
            raise MissingError(f"{self.name}: a refit needs the GPU that the engine is for; {available.reason}")
        ok, reason = self.loads_here(source.record)
        if not ok:
            raise MissingError(f"{self.name}: {reason}")
        return refit(self.module(), source.path.read_bytes(), weights, onnx, graph)

    def loads_here(self, record: EngineRecord) -> tuple[bool, str]:
        version, built = self._version(), record.runtime.get(self.package)
        if version is None:
            return False, f"{self.package} {built} is needed and not installed; {self.install}"
        compatible = "VERSION_COMPATIBLE" in record.settings.get("flags", ())
        if not _fits(built or "", version, compatible):
            wanted = f"{built} or a newer one of the same major version" if compatible else f"exactly {built}"
            return False, f"built with {self.package} {built}, {version} is installed; it needs {wanted}"
        here = gpu_here()
        if here is None:
            return False, f"needs a GPU ({', '.join(record.targets)}), torch sees none here"
        reason = self.runs_on(here)
        if reason is not None:
            return False, reason
        level = record.settings.get("hardware_compatibility_level")
        if level == "ampere-plus" and int(here[2:]) >= 80:
            return True, f"built for every GPU from sm80 on, {here} is here"
        if here not in record.targets:
            return (
                False,
                f"built for {', '.join(record.targets)}, the GPU here is {here}; build it with --target {here}",
            )
        return True, f"{self.package} {version} and {here} are here"

    def _version(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return None
        try:
            return str(self.module().__version__)
        except (ImportError, OSError):  # a package without its libraries
            return None


def gpu_here() -> str | None:
    """The first GPU's compute capability, as `sm89`; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _fits(built: str, installed: str, compatible: bool) -> bool:
    """Whether an engine of one version loads in another: in the same one, or, built to be, in newer ones of its major."""
    if built == installed:
        return True
    if not compatible:
        return False
    first, second = ([int(part) for part in version.split(".") if part.isdigit()] for version in (built, installed))
    return first[:1] == second[:1] and first <= second
