"""ONNX Runtime, on the CPU or CUDA provider, with buffers bound where they lie, and on CUDA with fused operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from trexport.errors import ArtifactError, MissingError, RunError
from trexport.graph.layout import takes_nhwc
from trexport.graph.ort_graph import OrtGraph, ort_graph, usual_passes
from trexport.io_spec import ModelSpec
from trexport.models.float32 import is_float32
from trexport.models.model import DTYPES, sizes_of, spread_timestep

_PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_INSTALL = "install trexport[onnxruntime] for the CPU, or trexport[onnxruntime-gpu] for CUDA"
# what ONNX Runtime says where an operator has no kernel for a precision, the last one on CUDA
_NO_KERNEL = ("NOT_IMPLEMENTED", "Could not find an implementation", "Provider type for")
# onnx.TensorProto.DataType
_ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


class GraphCaptureError(Exception):
    """A session that cannot be replayed as a CUDA graph: not all of its nodes run on the device."""


def open_session(
    model: str | bytes,
    device: Device,
    *,
    folder: Path | None = None,
    sizes: Mapping[str, int] | None = None,
    graph: bool = False,
    nhwc: bool = True,
    fold_constants: bool = True,
    provider: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` on exactly the provider of `device`.

    Args:
        model: a path, or the serialised graph; then `folder` is where its external data lies.
        sizes: fixes free axes by name, so that nothing computes shapes at run time.
        graph: capture a CUDA graph; the session's inputs must then stay where they are first bound.
        nhwc: convolutions in the layout that tensor cores want, on CUDA, where the model lets it (see `takes_nhwc`); ONNX
            Runtime's do not take bfloat16.
        fold_constants: off where the constants are large and what is made of them would be kept beside them.
        provider: further options of the CUDA provider, by its own names.
        profile: a prefix, for ONNX Runtime to write what each node takes into a file; `end_profiling` tells which.

    Raises:
        MissingError: no ONNX Runtime, no such provider in it, or no kernels for the model.
        GraphCaptureError: the model has nodes that a CUDA graph cannot hold.
        ArtifactError: ONNX Runtime does not take the model.
    """
    available = _availability(device)
    if not available.ok:
        raise MissingError(f"onnxruntime: {available.reason}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # idle threads that spin would steal the cores of whatever runs between two runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    for axis, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(axis, size)
    provider_options: dict[str, str] = {}
    if device == "cuda":
        # torch's stream, so that CUDA events see the work
        provider_options = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
        provider_options["prefer_nhwc"] = "1" if nhwc and takes_nhwc(model) else "0"
        provider_options["enable_cuda_graph"] = "1" if graph else "0"
        provider_options |= provider or {}
    try:
        session = onnxruntime.InferenceSession(
            model,
            options,
            providers=[(_PROVIDERS[device], provider_options)],
            disabled_optimizers=[] if fold_constants else ["ConstantFolding"],
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        text = str(error)
        if graph and "graph capture" in text:
            raise GraphCaptureError(text.strip()) from error
        if any(sign in text for sign in _NO_KERNEL):
            raise MissingError(
                f"onnxruntime: its {_PROVIDERS[device]} has no kernel for this model ({text.strip()}); "
                "use another device, or export in another precision"
            ) from error
        raise ArtifactError(f"onnxruntime does not load the model: {text.strip()}") from error
    if session.get_providers()[0] != _PROVIDERS[device]:
        raise MissingError(
            f"onnxruntime: asked for {_PROVIDERS[device]}, it fell back to {session.get_providers()[0]}: its CUDA "
            "libraries were not found (import torch first, or install the CUDA and cuDNN versions it was built for)"
        )
    return session


def exact(spec: ModelSpec) -> dict[str, str]:
    """Options of the CUDA provider for a model in float32 to compute in float32. It lets cuBLAS and cuDNN take TF32 unless
    told otherwise; of a model in half precision the same option would take its tensor cores away from cuDNN."""
    return {"use_tf32": "0"} if is_float32(spec) else {}


def bound_run(
    session: Any,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    device: Device,
    *,
    release_memory: bool = False,
) -> Callable[[], None]:
    """A call that runs a session on tensors where they lie, and keeps them. On CUDA it only queues the work.

    The call raises `RunError` where ONNX Runtime does not run it.
    """
    import onnxruntime

    binding = session.io_binding()
    for name, tensor in inputs.items():
        element = _ELEMENT_TYPES[tensor.dtype]
        binding.bind_input(name, device, 0, element, list(tensor.shape), tensor.data_ptr())
    for name, tensor in outputs.items():
        element = _ELEMENT_TYPES[tensor.dtype]
        binding.bind_output(name, device, 0, element, list(tensor.shape), tensor.data_ptr())
    options = onnxruntime.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if release_memory:
        arena = "cpu:0" if device == "cpu" else "gpu:0"
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)

    held = (binding, dict(inputs), dict(outputs))  # the binding has the tensors' addresses only

    def run() -> None:
        try:
            session.run_with_iobinding(held[0], options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise RunError(f"onnxruntime did not run the model: {str(error).strip()}") from error

    return run


def write_adapter_file(path: Path, tensors: Mapping[str, Tensor], model_version: int) -> None:
    """Write ONNX Runtime's adapter format: tensors by input name. Raises `MissingError` where it is not installed."""
    onnxruntime = _module()
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(model_version)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(t.contiguous().numpy()) for name, t in tensors.items()}
    adapter.set_parameters({name: values[name] for name in sorted(values)})
    adapter.export_adapter(str(path.absolute()))


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], int]:
    """Tensors and model version of a file in ONNX Runtime's adapter format.

    Raises:
        ArtifactError: it cannot be read.
        MissingError: ONNX Runtime is not installed.
    """
    onnxruntime = _module()
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path.absolute()))
        values = {name: torch.from_numpy(value.numpy().copy()) for name, value in adapter.get_parameters().items()}
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise ArtifactError(f"{path}: no adapter file of ONNX Runtime ({str(error).strip()})") from error
    return values, adapter.get_model_version()


def _module() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(f"onnxruntime: not installed; {_INSTALL}") from error
    return onnxruntime


@final
class _OnnxRuntimeRunner(Runner):
    def __init__(self, source: OnnxFile, device: Device, graph: OrtGraph | None, provider: Mapping[str, str]) -> None:
        self.spec = source.spec
        self.device = device
        self._path = source.path
        self._graph = graph
        self._fed = None if source.graph is None else "as in a session: weights are fed, not the file's cores"
        self._provider = provider
        self._release_memory = source.release_memory
        self._constants = {name: tensor.to(device).contiguous() for name, tensor in source.constants.items()}
        self._session: Any = self._open()

    def _open(self, sizes: Mapping[str, int] | None = None, *, graph: bool = False) -> Any:
        nhwc = all(tensor.dtype != "bf16" for tensor in self.spec.outputs)
        provider = exact(self.spec)
        if self._graph is None:
            provider |= self._provider
            return open_session(str(self._path), self.device, sizes=sizes, graph=graph, nhwc=nhwc, provider=provider)
        # without it they sum in half precision
        provider["enable_skip_layer_norm_strict_mode"] = "1"
        if self._graph.replaced.get("nhwc_conv"):
            nhwc = False  # they are already, and nothing else is to change its layout
            # cuDNN's first choice, as torch takes it; its search finds the same kernels. What biases are left are added by
            # kernels of their own: cuDNN generates slower ones for convolutions with a bias
            provider["cudnn_conv_algo_search"] = "HEURISTIC"
        return open_session(
            self._graph.model,
            self.device,
            folder=self._path.parent,
            sizes=sizes,
            graph=graph,
            nhwc=nhwc,
            provider=provider | dict(self._provider),
        )

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = self._bind(self._session, feeds)
        step.run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return dict(step.outputs)

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        if self.device == "cpu":
            return replace(self._bind(self._session, feeds), note=self._notes())
        self._session = None  # one copy of the weights at a time
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # the default stream cannot be captured
            sizes, note = sizes_of(self.spec, feeds), None
            try:
                self._session = self._open(sizes, graph=True)
            except GraphCaptureError:
                note = "not captured as a CUDA graph: ONNX Runtime runs some of this model's nodes on the CPU"
                self._session = self._open(sizes)
            inner = self._bind(self._session, feeds)
            try:
                for _ in range(3):  # allocate, capture, replay
                    inner.run()
            except RunError as error:
                if note is not None or "capture" not in str(error):
                    raise
                note = "not captured as a CUDA graph: a kernel of ONNX Runtime's refuses to be"
                self._session = None
                self._session = self._open(sizes)
                inner = self._bind(self._session, feeds)
                inner.run()
        torch.cuda.synchronize()

        def run() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            inner.run()
            torch.cuda.current_stream().wait_stream(stream)

        return Step(run, inner.inputs, inner.outputs, self._notes(note))

    def close(self) -> None:
        self._session = None

    def _notes(self, captured: str | None = None) -> str | None:
        replaced = self._graph is not None and self._graph.replaced
        rewritten = f"rewritten, places by pass: {self._graph}" if replaced else None
        return "; ".join(text for text in (self._fed, captured, rewritten) if text is not None) or None

    def _bind(self, session: Any, feeds: Mapping[str, Tensor]) -> Step:
        feeds = spread_timestep(self.spec, feeds)
        inputs = {
            spec.name: feeds[spec.name].to(self.device, DTYPES[spec.dtype], copy=True).contiguous()
            for spec in self.spec.inputs
            if spec.name not in self._constants
        }
        sizes = sizes_of(self.spec, inputs)
        outputs = {
            spec.name: torch.empty(spec.shape(sizes), dtype=DTYPES[spec.dtype], device=self.device)
            for spec in self.spec.outputs
        }
        fed = inputs | self._constants
        run = bound_run(session, fed, outputs, self.device, release_memory=self._release_memory)
        return Step(run, inputs, outputs)


def _availability(device: Device) -> Availability:
    try:
        import onnxruntime
    except ImportError:
        return Availability(False, None, f"not installed; {_INSTALL}")
    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        reason = f"the installed ONNX Runtime {onnxruntime.__version__} has no {provider}; {_INSTALL}"
        return Availability(False, onnxruntime.__version__, reason)
    if device == "cuda" and not torch.cuda.is_available():
        return Availability(False, onnxruntime.__version__, "this torch sees no CUDA device; use --device cpu")
    return Availability(True, onnxruntime.__version__)


@final
@dataclass(frozen=True)
class OnnxRuntime(AbstractBackend):
    """ONNX Runtime with IO binding; on CUDA with a CUDA graph, channels last, and a graph that is rewritten with the
    provider's fused operators while it is loaded (see `trexport.graph.ort_graph`); the file stays as it is."""

    name: ClassVar[str] = "onnxruntime"
    consumes: ClassVar[type[TorchModel] | type[OnnxFile] | type[EngineFile]] = OnnxFile

    passes: Sequence[str] | None = None
    """By which to rewrite graphs, on any device; None for `usual_passes` on CUDA in half precision (fp16), the only one that
    all of the operators have kernels for, and none otherwise."""
    provider: Mapping[str, str] = field(default_factory=dict)
    """Further options of the CUDA provider, by its own names."""

    def availability(self, device: Device) -> Availability:
        return _availability(device)

    def load(self, source: Source, device: Device) -> Runner:
        assert isinstance(source, OnnxFile)
        available = _availability(device)
        if not available.ok:
            raise MissingError(f"onnxruntime: {available.reason}")
        half = any(tensor.dtype == "fp16" for tensor in source.spec.outputs)
        passes = self.passes if self.passes is not None else usual_passes() if device == "cuda" and half else ()
        graph = ort_graph(source.path, passes, source.graph) if passes or source.graph is not None else None
        return _OnnxRuntimeRunner(source, device, graph, self.provider)
