"""TensorRT-RTX: engines built ahead of time on any machine, compiled to the last on the user's GPU."""

from __future__ import annotations

from typing import Any, ClassVar, final

from trexport.backends.base import EngineOptions
from trexport.backends.trt.backend import TrtBackend, gpu_here
from trexport.errors import MissingError, UsageError
from trlora.errors import nearest


@final
class TensorRtRtx(TrtBackend):
    """NVIDIA TensorRT for RTX: GeForce and RTX GPUs from Turing on, no compute capability 9.0."""

    name: ClassVar[str] = "tensorrt-rtx"
    file_name: ClassVar[str] = "model.rtx"
    package: ClassVar[str] = "tensorrt_rtx"
    install: ClassVar[str] = "pip install trexport[tensorrt-rtx]; it needs no GPU to build"

    def module(self) -> Any:
        import tensorrt_rtx

        return tensorrt_rtx

    def known_targets(self) -> tuple[str, ...]:
        """The GPUs that the installed version builds for."""
        names = [name.lower() for name in self.module().ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(sorted(names, key=lambda name: int(name[2:])))

    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        known = self.known_targets()
        for target in options.targets:
            if target not in known:
                raise UsageError(
                    f"tensorrt-rtx {self.module().__version__} builds for {', '.join(known)}, not for {target!r}"
                    f"{nearest(target, known)}"
                )
        here = gpu_here()
        if options.targets:
            return tuple(dict.fromkeys(options.targets))
        # Turing is left out unless asked for: it has no products in float32
        return (here,) if here in known else tuple(target for target in known if target != "sm75")

    def refuse(self, options: EngineOptions) -> None:
        if options.timing_cache is not None:
            raise UsageError(
                "tensorrt-rtx: has no timing cache, for it times nothing at the build; leave --timing-cache out"
            )
        if options.hardware_compatible is not None:
            raise UsageError("tensorrt-rtx: is for every GPU that --target names; give several instead")
        if options.version_compatible:
            raise UsageError(
                "tensorrt-rtx: has no lean runtime to put into an engine for other versions; leave --version-compatible out"
            )
        if options.optimization_level is not None:
            raise UsageError("tensorrt-rtx: has one optimization level; leave --optimization-level out")
        if options.refit is not None and gpu_here() is None:
            raise MissingError(
                "tensorrt-rtx: builds refittable and stripped engines on a machine with a GPU only, and torch sees none here"
            )

    def runs_on(self, target: str) -> str | None:
        if target in self.known_targets():
            return None
        return (
            f"tensorrt-rtx {self.module().__version__} supports {', '.join(self.known_targets())}, the GPU here is "
            f"{target}; use tensorrt, onnxruntime or aotinductor"
        )
