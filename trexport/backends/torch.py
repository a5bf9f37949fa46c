"""PyTorch: eager, and compiled by Inductor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from trexport.backends.base import (
    AbstractBackend,
    Availability,
    Device,
    EngineFile,
    OnnxFile,
    Runner,
    Source,
    Step,
    TorchModel,
)
from trexport.cuda_graph import captured
from trexport.errors import MissingError
from trexport.models.float32 import full_float32, is_float32
from trexport.models.model import attach_all_, load_model, merge_into_, outputs_of, spread_timestep


@final
class _TorchRunner(Runner):
    def __init__(self, source: TorchModel, device: Device, *, compiled: bool) -> None:
        self.spec = source.base.architecture.spec(source.dtype)
        self.device = device
        model = load_model(source.base, source.dtype)
        if source.factored:
            attach_all_(model, source.adapters)
        else:
            merge_into_(model, source.adapters)
        model.to(device)
        if compiled:
            options: dict[str, Any] = {}
            if device == "cuda":  # as PyTorch's users make it fast
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                options = {"conv_1x1_as_mm": True}
                if not source.factored and source.base.architecture.rewritable:
                    model.fuse_qkv_projections()  # type: ignore[operator]
            model.compile(fullgraph=True, dynamic=False, options=options)
        self._model = model

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: tensor.to(self.device) for name, tensor in spread_timestep(self.spec, feeds).items()}
        return {name: output.clone() for name, output in self._run(inputs).items()}

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        inputs = {name: tensor.to(self.device, copy=True) for name, tensor in spread_timestep(self.spec, feeds).items()}
        buffers = {name: output.clone() for name, output in self._run(inputs).items()}
        if self.device == "cpu":

            def run() -> None:
                with torch.inference_mode():
                    for name, output in self._run(inputs).items():
                        buffers[name].copy_(output)

            return Step(run, inputs, buffers)
        graph, buffers = captured(lambda: self._run(inputs))
        return Step(graph.replay, inputs, buffers)

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(), full_float32(is_float32(self.spec)):
            outputs = outputs_of(self._model, inputs)
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        del self._model
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class _Torch(AbstractBackend):
    consumes: ClassVar[type[TorchModel] | type[OnnxFile] | type[EngineFile]] = TorchModel
    compiled: ClassVar[bool]

    def availability(self, device: Device) -> Availability:
        if device == "cuda" and not torch.cuda.is_available():
            return Availability(False, torch.__version__, "this torch sees no CUDA device; use --device cpu")
        return Availability(True, torch.__version__)

    def load(self, source: Source, device: Device) -> Runner:
        assert isinstance(source, TorchModel)
        available = self.availability(device)
        if not available.ok:
            raise MissingError(f"{self.name}: {available.reason}")
        return _TorchRunner(source, device, compiled=self.compiled)


@final
class TorchEager(_Torch):
    """The model as diffusers runs it."""

    name: ClassVar[str] = "torch"
    compiled: ClassVar[bool] = False


@final
class TorchCompile(_Torch):
    """`torch.compile`; on CUDA channels-last, with diffusers' fused projections of q, k and v, and 1×1 convolutions as
    products."""

    name: ClassVar[str] = "torch-compile"
    compiled: ClassVar[bool] = True
