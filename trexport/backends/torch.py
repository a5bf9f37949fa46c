"""PyTorch: eager, and compiled by Inductor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

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
from trexport.errors import MissingError
from trexport.io_spec import unet_spec
from trexport.models.unet import attach_all_, call_unet, load_unet, merge_into_

_WARM_UP = 3


@final
class _TorchRunner(Runner):
    def __init__(self, source: TorchModel, device: Device, *, compiled: bool) -> None:
        self.spec = unet_spec(source.base.config, source.dtype)
        self.device = device
        model = cast(nn.Module, load_unet(source.base, source.dtype))  # diffusers' `to` has no types of its own
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
                if not source.factored:
                    model.fuse_qkv_projections()  # type: ignore[operator]
            model.compile(fullgraph=True, dynamic=False, options=options)
        self._model = model

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            output = call_unet(self._model, {name: tensor.to(self.device) for name, tensor in feeds.items()})
        return {self.spec.outputs[0].name: output.clone()}

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        inputs = {name: tensor.to(self.device, copy=True) for name, tensor in feeds.items()}
        name = self.spec.outputs[0].name
        with torch.inference_mode():
            output = call_unet(self._model, inputs)
        buffer = output.clone()
        if self.device == "cpu":

            def run() -> None:
                with torch.inference_mode():
                    buffer.copy_(call_unet(self._model, inputs))

            return Step(run, inputs, {name: buffer})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.inference_mode():
            for _ in range(_WARM_UP):
                call_unet(self._model, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.inference_mode():
            buffer = call_unet(self._model, inputs)
        return Step(graph.replay, inputs, {name: buffer})

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
