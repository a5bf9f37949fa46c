"""TensorRT. Built and run on the GPU that is here; not executed on the project's own machines, see README."""

from __future__ import annotations

from typing import Any, ClassVar, final

from trexport.backends.base import EngineOptions
from trexport.backends.trt.backend import TrtBackend, gpu_here
from trexport.errors import MissingError, UsageError


@final
class TensorRt(TrtBackend):
    """NVIDIA TensorRT, 10.13 and newer: strongly typed networks."""

    name: ClassVar[str] = "tensorrt"
    file_name: ClassVar[str] = "model.plan"
    package: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = "pip install trexport[tensorrt], on a machine with an NVIDIA GPU"

    def module(self) -> Any:
        import tensorrt

        return tensorrt

    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        here = gpu_here()
        if here is None:
            raise MissingError(
                "tensorrt: builds on the GPU that the engine is for, torch sees none here; tensorrt-rtx builds without one"
            )
        if options.targets and options.targets != (here,):
            raise UsageError(
                f"tensorrt: builds for the GPU that is here, {here}, not for {', '.join(options.targets)}; "
                "give --hardware-compatible, or build on that GPU"
            )
        return (here,)

    def refuse(self, options: EngineOptions) -> None:
        version = tuple(int(part) for part in str(self.module().__version__).split(".")[:2])
        if options.refit == "all" and version == (11, 3):
            raise UsageError(
                "tensorrt 11.3: engines built with REFIT can compute wrong results (the bias of a product is lost, says its "
                "documentation); install 11.4 or newer, or keep adapters out of the weights: --factored, --swappable"
            )

    def runs_on(self, target: str) -> str | None:
        return None if int(target[2:]) >= 75 else f"TensorRT needs compute capability 7.5 or newer, {target} is here"
