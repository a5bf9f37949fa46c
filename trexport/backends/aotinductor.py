"""AOTInductor: a model compiled ahead of time by PyTorch's own compiler into a `.pt2` package, for the CPU or CUDA.

The package needs torch alone, none of our code:

```python
import torch

model = torch._inductor.aoti_load_package("engine/unet/model.pt2")
out = model(sample=x, timestep=torch.tensor(500.0), encoder_hidden_states=c)  # a tensor; names as in trexport.json
model.load_constants({"mid_block.attentions.0.proj_in.weight": w}, check_full_update=False)  # the UNet's parameter names
```

From `--optimization-level 1` on, several linear layers of one input are one in the package (`trexport.models.fused`); the
record's `placements` say in which constant, and where in it, a layer's weight lies.

Inputs are contiguous, of the dtypes in the manifest, on the package's device, inside its profile. torch takes constants of a
wrong shape without a word and draws garbage: check them first, as the runner here does. A package is machine code: load only
what you trust.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
    Step,
    TorchModel,
)
from trexport.cpp_compiler import compiler_name, compiler_path, complaint
from trexport.errors import ArtifactError, ExportError, MissingError, RunError, UsageError
from trexport.io_spec import ModelSpec, parts_of
from trexport.models.architectures import Limit, spec_of
from trexport.models.fused import fuse_, join_, options_for
from trexport.models.model import DTYPES, fitted, load_model, merge_into_, outputs_of, random_feeds, sizes_of
from trexport.profile import Profile
from trexport.progress import SILENT, Progress

_WARM_UP = 3
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_MULTIPLE = "height_width_multiple"
_FEATURES = "cpu_features"
_LAST_WORDS = 1500
_LEVELS: tuple[dict[str, Any], ...] = (
    {},
    {"conv_1x1_as_mm": True},
    {"conv_1x1_as_mm": True, "coordinate_descent_tuning": True},
    {"conv_1x1_as_mm": True, "coordinate_descent_tuning": True, "max_autotune": True},
)
"""Settings of the compiler by optimization level; from 1 on the UNet is rewritten too. Tuning measures on the device, which
takes minutes."""
# What is refused, by the name of its option; the options of `EngineOptions` that only TensorRT has.
_UNKNOWN = {
    "workspace_bytes": "--workspace",
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "refit": "--refit",
    "strip": "--strip",
}


@final
class _Step(nn.Module):
    """The model as a function of tensors named as the spec's. It has the model's own children, so that the names of all
    parameters are the model's."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)

        def forward(**feeds: Tensor) -> Tensor | tuple[Tensor, ...]:
            outputs = outputs_of(model, feeds)
            return outputs[0] if len(outputs) == 1 else outputs

        # torch.export asks which arguments there are
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = inspect.Signature([inspect.Parameter(tensor.name, kind) for tensor in spec.inputs])
        forward.__signature__ = named  # type: ignore[attr-defined]
        self.forward = forward


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's compiler has to say to its own developers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _cache() -> Iterator[None]:
    """A cache of the compiler that is gone afterwards, unless the user has one: torch's default grows without end."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from torch._inductor.utils import fresh_cache

    # torch itself puts its default there
    if os.environ.get(_CACHE, default_cache_dir()) != default_cache_dir():
        yield
        return

    with tempfile.TemporaryDirectory(prefix="trexport-inductor-") as folder, fresh_cache(dir=folder, delete=False):
        yield


def _cpu_features() -> list[str]:
    """What this CPU can do, by torch's names. The compiler makes code for all of it (`-march=native`)."""
    return sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)


def _target(device: Device) -> str:
    return "cpu" if device == "cpu" else "sm{}{}".format(*torch.cuda.get_device_capability())


def _traced_sizes(profile: Profile) -> dict[str, int]:
    """The usual sizes, but 2 where a free axis would be 1: torch takes a 1 for a constant."""
    return {axis: size if axis in profile.fixed else max(2, size) for axis, size in profile.opt.items()}


def _dynamic_shapes(spec: ModelSpec, profile: Profile, multiple: int) -> dict[str, dict[int, Any] | None]:
    """Input → dimension → its bounds, for the axes that the profile leaves free."""
    dims: dict[str, Any] = {}
    for axis in profile.opt.keys() - profile.fixed.keys():
        least, most = profile.min[axis], profile.max[axis]
        if axis in ("height", "width") and multiple > 1:
            dims[axis] = multiple * torch.export.Dim(axis, min=least // multiple, max=most // multiple)
        else:
            dims[axis] = torch.export.Dim(axis, min=least, max=most)
    shapes: dict[str, dict[int, Any] | None] = {}
    for tensor in spec.inputs:
        named = [(n, parts_of(axis)) for n, axis in enumerate(tensor.axes) if isinstance(axis, str)]
        free = {n: times * dims[name] if times > 1 else dims[name] for n, (name, times, _) in named if name in dims}
        shapes[tensor.name] = free or None
    return shapes


@final
class _AotInductorRunner(Runner):
    """A loaded package. Weights given as `constants`, by the names of `EngineRecord.constants`, are used where they lie: who
    overwrites them changes the next run."""

    def __init__(self, source: EngineFile, device: Device) -> None:
        self.spec = source.spec
        self.device = device
        self._record = source.record
        (self._profile,) = source.record.profiles
        self._constants = self._checked_constants(source)
        try:
            with _quiet():
                # torch's own lock around a run cannot be captured in a CUDA graph
                self._model: Any = torch._inductor.aoti_load_package(
                    str(source.path), run_single_threaded=device == "cuda"
                )
        except Exception as error:  # torch raises what it has at hand
            raise ArtifactError(
                f"{source.path}: torch {torch.__version__} does not load this package ({_first_line(error)}); "
                "build the engine again"
            ) from error
        if self._constants:
            lacks = self._constants.keys() - set(self._model.get_constant_fqns())
            if lacks:
                raise ArtifactError(f"{source.path}: {min(lacks)} is not in the package; build the engine again")
            self._model.load_constants(self._constants, check_full_update=False, user_managed=True)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(self._checked(feeds))

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        inputs = self._checked(feeds)
        buffers = self._run(inputs)
        if self.device == "cpu":

            def run() -> None:
                for name, tensor in self._run(inputs).items():
                    buffers[name].copy_(tensor)

            return Step(run, inputs, buffers)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            buffers = self._run(inputs)
        return Step(graph.replay, inputs, buffers)

    def close(self) -> None:
        self._model = None
        self._constants = {}
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            with torch.no_grad():  # not inference mode: whoever has the output may write into it
                found = self._model(**inputs)
        except RuntimeError as error:
            raise RunError(f"aotinductor did not run the model: {_first_line(error)}") from error
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        return {tensor.name: output for tensor, output in zip(self.spec.outputs, outputs, strict=True)}

    def _checked(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, copied to where and how the compiled code expects them: it does not look itself.

        Raises:
            UsageError: an input missing, or of a rank or size that the engine does not take.
        """
        inputs = {
            name: value.to(self.device, copy=True, memory_format=torch.contiguous_format)
            for name, value in fitted(self.spec, feeds).items()
        }
        sizes = sizes_of(self.spec, inputs)
        multiple = self._record.settings[_MULTIPLE]
        if not self._profile.holds(sizes) or any(sizes.get(axis, 0) % multiple for axis in ("height", "width")):
            raise UsageError(
                f"sizes {sizes} found, the engine takes {' x '.join(self._profile.opt)} {self._profile}, height and width "
                f"multiples of {multiple}; build one with a wider --profile"
            )
        return inputs

    def _checked_constants(self, source: EngineFile) -> dict[str, Tensor]:
        """Weights to put in the place of the package's own, on the device. torch itself would take any shape.

        Raises:
            ArtifactError: one that is no adapted weight of the engine, or of another shape or dtype.
        """
        dtype = DTYPES[self.spec.outputs[0].dtype]
        layers = source.record.constants()
        for name, tensor in source.constants.items():
            if name not in layers:
                raise ArtifactError(f"{source.path}: {name} is no weight that this engine lets be replaced")
            if tuple(tensor.shape) != layers[name] or tensor.dtype != dtype:
                raise ArtifactError(
                    f"{source.path}: {name}: {tensor.dtype} of shape {list(tensor.shape)} found, expected {dtype} of "
                    f"{list(layers[name])}"
                )
        return {name: tensor.to(self.device).contiguous() for name, tensor in source.constants.items()}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _last_words(error: BaseException) -> str:
    """The end of what a compiler said, without the colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return text if len(text) <= _LAST_WORDS else "… " + text[-_LAST_WORDS:]


@final
class AotInductor(EngineBackend):
    """`torch.export`, then AOTInductor; channels-last on CUDA, where a step is a CUDA graph."""

    name: ClassVar[str] = "aotinductor"
    builds_from: ClassVar[type[TorchModel] | type[OnnxFile]] = TorchModel
    file_name: ClassVar[str] = "model.pt2"

    def availability(self, device: Device) -> Availability:
        if device == "cuda" and not torch.cuda.is_available():
            return Availability(False, torch.__version__, "this torch sees no CUDA device; use --device cpu")
        return Availability(True, torch.__version__)

    def check(self, options: EngineOptions, form: str) -> EngineOptions:
        if options.targets:
            raise UsageError(
                f"--target {','.join(options.targets)}: aotinductor compiles for the machine it runs on; leave it out, and "
                "choose --device"
            )
        for field, option in _UNKNOWN.items():
            if getattr(options, field) not in (None, False):
                raise UsageError(f"{option}: aotinductor has no such option; leave it out")
        level = options.optimization_level
        if level is not None and level >= len(_LEVELS):
            raise UsageError(f"--optimization-level {level}: aotinductor knows 0 to {len(_LEVELS) - 1}")
        if len(options.profiles) != 1:
            raise UsageError(
                f"{len(options.profiles)} profiles given, aotinductor takes one; give one that holds all sizes"
            )
        if form == "factored":
            raise UsageError("a factored artifact or bank: aotinductor compiles merged and swappable models")
        compiler = compiler_path()
        if compiler is None:
            raise MissingError(
                f"aotinductor: no C++ compiler, {compiler_name()} is not on the PATH; install g++ (apt install g++), or set "
                "CXX"
            )
        wrong = complaint(compiler)
        if wrong is not None:
            raise MissingError(
                f"aotinductor: the C++ compiler {compiler} {wrong}; set CXX to another (CXX=/usr/bin/g++)"
            )
        available = self.availability(options.device)
        if not available.ok:
            raise MissingError(f"aotinductor: {available.reason}")
        return options

    def build(
        self,
        source: TorchModel | OnnxFile,
        folder: Path,
        options: EngineOptions,
        *,
        progress: Progress = SILENT,
    ) -> tuple[EngineRecord, BuildReport]:
        assert isinstance(source, TorchModel)
        (profile,) = options.profiles
        device = options.device
        spec = spec_of(source.base.config, source.dtype, timestep_per_sample=source.timestep_per_sample)
        multiple = source.base.architecture.limits().get("height", Limit()).multiple
        model = load_model(source.base, source.dtype, progress=progress)
        merge_into_(model, source.adapters, progress=progress)
        model.to(device)
        level = options.optimization_level or 0
        if level and not source.base.architecture.rewritable:
            raise UsageError(
                f"--optimization-level {level}: only UNets are rewritten, and this is a {source.base.architecture.noun}; "
                "leave it out"
            )
        fused = fuse_(cast(Any, model), options_for(device, DTYPES[source.dtype])) if level else None
        if device == "cuda":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        feeds = {n: t.to(device) for n, t in random_feeds(spec, _traced_sizes(profile)).items()}
        settings: dict[str, Any] = {
            # a literal in the code cannot be replaced
            "always_keep_tensor_constants": True,
            # it may run on a machine with another number of cores
            "cpp.dynamic_threads": True,
            # torch would put gigabytes of them into the system's temporary folder, whatever cache it is given, and keep them
            "aot_inductor.precompile_headers": False,
            **_LEVELS[level],
        }
        path = folder / self.file_name
        start = time.perf_counter()
        try:
            with _quiet(), _cache(), torch.no_grad():
                with progress.task("trace"):
                    program = torch.export.export(
                        _Step(model, spec).eval(),
                        (),
                        feeds,
                        dynamic_shapes=_dynamic_shapes(spec, profile, multiple),
                    )
                    # torch.export switches cuDNN off, and what fake convolutions answer then, a layout that is not
                    # cuDNN's, is kept for whoever asks next: the compiler would read real outputs in a wrong order
                    FakeTensorMode.cache_clear()
                    joined = join_(program) if fused is not None and fused.options.kernels == "triton" else {}
                with progress.task("compile"):
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(path), inductor_configs=dict(settings)
                    )
        except Exception as error:  # tracer, compiler and linker each have their own
            raise ExportError(f"aotinductor does not compile this model: {_last_words(error)}") from error
        settings |= {"device": device, _MULTIPLE: multiple, "optimization_level": level}
        if fused is not None:
            settings |= {"rewrites": fused.to_dict(), "joined": dict(joined)}
        if device == "cpu":
            settings |= {"isa": torch.backends.cpu.get_cpu_capability(), _FEATURES: _cpu_features()}
        record = EngineRecord(
            backend=self.name,
            file=self.file_name,
            runtime={"torch": torch.__version__},
            targets=(_target(device),),
            profiles=(profile,),
            settings=settings,
            placements={} if fused is None else fused.placements,
        )
        return record, BuildReport(time.perf_counter() - start, path.stat().st_size)

    def loads_here(self, record: EngineRecord) -> tuple[bool, str]:
        built = record.runtime["torch"]
        if _minor(built) != _minor(torch.__version__):
            return False, f"it was built with torch {built}, here is {torch.__version__}; build it again"
        (target,) = record.targets
        if target == "cpu":
            lacks = sorted(set(record.settings[_FEATURES]) - set(_cpu_features()))
            if lacks:
                return False, f"it was built for {record.settings['isa']}, and this CPU has no {', '.join(lacks)}"
            return True, f"torch {torch.__version__}, and this CPU has all that it was built for"
        if not torch.cuda.is_available():
            return False, f"it was built for {target}, and torch sees no CUDA device here"
        if _target("cuda") != target:
            return False, f"it was built for {target}, here is {_target('cuda')}; build it again"
        return True, f"torch {torch.__version__} and {target}"

    def load(self, source: Source, device: Device) -> Runner:
        assert isinstance(source, EngineFile)
        available = self.availability(device)
        if not available.ok:
            raise MissingError(f"aotinductor: {available.reason}")
        ok, why = self.loads_here(source.record)
        if not ok:
            raise MissingError(f"{source.path}: this engine does not load here: {why}")
        if source.record.device != device:
            own = source.record.device
            raise UsageError(f"{source.path}: this engine was built for {own}; use --device {own}")
        return _AotInductorRunner(source, device)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
