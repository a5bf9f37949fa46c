"""A loaded engine on device buffers. Written to the API of the installed bindings; not executed on our GPUs, see README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from trexport.backends.base import Device, EngineFile, Runner, Step
from trexport.backends.trt.log import quiet_logger
from trexport.errors import ArtifactError, RunError, UsageError
from trexport.models.model import DTYPES, sizes_of, spread_timestep

_WARM_UP = 3


@final
class TensorRtRunner(Runner):
    """Inputs are copied into buffers of the device, constants are used where they lie: a swap of adapters is a copy into
    them, or another pointer. The profile is the first that holds the inputs' sizes.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.

    Raises:
        ArtifactError: the runtime does not load the engine; its own words are in the message.
        UsageError: the weights were left out of the engine.
    """

    device: Device = "cuda"

    def __init__(self, trt: Any, source: EngineFile) -> None:
        self.spec = source.spec
        self._record = source.record
        if source.record.settings.get("strip"):
            raise UsageError(f"{source.path}: built without its weights; put them in with trexport refit --onnx")
        self._logger = quiet_logger(trt)
        self._runtime: Any = trt.Runtime(self._logger)
        # an engine for newer versions brings a runtime of its own along, which is code
        self._runtime.engine_host_code_allowed = "VERSION_COMPATIBLE" in source.record.settings["flags"]
        self._engine: Any = self._runtime.deserialize_cuda_engine(source.path.read_bytes())
        if self._engine is None:
            reason = self._logger.errors[0] if self._logger.errors else "it gives no reason"
            raise ArtifactError(f"{source.path}: {trt.__name__} {trt.__version__} does not load it: {reason}")
        self._constants = {name: tensor.to("cuda").contiguous() for name, tensor in source.constants.items()}
        self._check_bindings(trt, source)
        self._context: Any = self._context_of(trt)
        self._profile = 0

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs, outputs = self._bind(feeds)
        self._enqueue()
        torch.cuda.current_stream().synchronize()
        del inputs  # they had to live until here
        return outputs

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the default stream cannot be captured
            inputs, outputs = self._bind(feeds)
            for _ in range(_WARM_UP):  # shapes are specialised, and memory is allocated, before the capture
                self._enqueue()
            stream.synchronize()
            if not self._capturable(stream):
                torch.cuda.current_stream().wait_stream(stream)
                note = "not captured as a CUDA graph: the engine has work that a graph cannot hold"
                return Step(self._enqueue, inputs, outputs, note)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._enqueue()
        torch.cuda.current_stream().wait_stream(stream)
        return Step(graph.replay, inputs, outputs)

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        torch.cuda.empty_cache()

    def _context_of(self, trt: Any) -> Any:
        """An execution context; TensorRT-RTX compiles kernels for the shapes at hand before the first run, not beside it."""
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # a step captures its own
        return self._engine.create_execution_context(config)

    def _check_bindings(self, trt: Any, source: EngineFile) -> None:
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        wanted = {tensor.name for tensor in [*self.spec.inputs, *self.spec.outputs]} | set(self._constants)
        if names != wanted:
            raise ArtifactError(
                f"{source.path}: the engine has {sorted(names - wanted)} that are not given, and lacks "
                f"{sorted(wanted - names)}; build it again"
            )
        of_spec = {tensor.name for tensor in self.spec.inputs}
        for name, tensor in self._constants.items():
            if name in of_spec:  # its shape goes with the batch
                continue
            shape = tuple(self._engine.get_tensor_shape(name))
            if shape != tuple(tensor.shape):
                raise ArtifactError(f"{name}: shape {tuple(tensor.shape)} given, the engine takes {shape}")

    def _bind(self, feeds: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        feeds = spread_timestep(self.spec, feeds)
        inputs = {
            spec.name: feeds[spec.name].to("cuda", DTYPES[spec.dtype], copy=True).contiguous()
            for spec in self.spec.inputs
            if spec.name not in self._constants
        }
        sizes = sizes_of(self.spec, inputs)
        self._choose_profile(sizes)
        for name, tensor in {**inputs, **self._constants}.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise UsageError(f"{name}: shape {tuple(tensor.shape)} is none that the engine takes")
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {
            spec.name: torch.empty(spec.shape(sizes), dtype=DTYPES[spec.dtype], device="cuda")
            for spec in self.spec.outputs
        }
        for name, tensor in outputs.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        return inputs, outputs

    def _choose_profile(self, sizes: Mapping[str, int]) -> None:
        profiles = self._record.profiles
        fitting = [index for index, profile in enumerate(profiles) if profile.holds(sizes)]
        if not fitting:
            raise UsageError(f"sizes {dict(sizes)} found, the engine takes {'; '.join(map(str, profiles))}")
        if fitting[0] != self._profile:
            stream = torch.cuda.current_stream()
            if not self._context.set_optimization_profile_async(fitting[0], stream.cuda_stream):
                raise RunError(f"the engine does not switch to its profile {profiles[fitting[0]]}")
            stream.synchronize()
            self._profile = fitting[0]

    def _capturable(self, stream: torch.cuda.Stream) -> bool:
        check = getattr(self._context, "is_stream_capturable", None)
        return True if check is None else bool(check(stream.cuda_stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            reason = self._logger.errors[-1] if self._logger.errors else "it gives no reason"
            raise RunError(f"the engine broke off: {reason}")
