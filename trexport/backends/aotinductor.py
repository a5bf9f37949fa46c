"""AOTInductor: PyTorch's own compiler, ahead of time. A package is loaded with torch alone:

```python
unet = torch._inductor.aoti_load_package("unet/model.pt2")
out = unet(sample=x, timestep=t, encoder_hidden_states=c)  # inputs by the names of the UNet's spec
unet.load_constants({"<path>.to_q.weight": w}, check_full_update=False)  # weights have their PyTorch names
```
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

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
from trexport.errors import ArtifactError, ExportError, MissingError, UsageError
from trexport.io_spec import FREE_AXES, ModelSpec, downscale_of, unet_spec
from trexport.models.unet import DTYPES, call_unet, load_unet, merge_into_, random_feeds, spread_timestep
from trexport.profile import Profile
from trexport.progress import SILENT, Progress

_WARM_UP = 3
# of what cannot be an instruction set of this machine's compiler
_NO_NOTION = {
    "targets": "--target",
    "optimization_level": "--optimization-level",
    "workspace_bytes": "--workspace",
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "refit": "--refit",
    "strip": "--strip",
}


@final
class _Step(nn.Module):
    """One step with its inputs by name, and the UNet's parameters under their own names."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        for name, child in unet.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_unet", unet)  # as a child it would put its name before every parameter's

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        feeds = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        if text_embeds is not None and time_ids is not None:
            feeds |= {"text_embeds": text_embeds, "time_ids": time_ids}
        unet: Any = self._unet
        return call_unet(unet, feeds)


@final
class _AotInductorRunner(Runner):
    def __init__(self, source: EngineFile, device: Device) -> None:
        self.spec = source.spec
        self.device = device
        self._profile = source.record.profiles[0]
        try:
            with _quiet():
                self._model: Any = torch._inductor.aoti_load_package(str(source.path))
        except (RuntimeError, OSError) as error:
            raise ArtifactError(f"{source.path}: torch {torch.__version__} does not load it: {error}") from error
        self._constants = {name: tensor.to(device) for name, tensor in source.constants.items()}
        if self._constants:
            self._check_constants(source)
            # by reference: who overwrites them changes the next run
            self._model.load_constants(self._constants, check_full_update=False, user_managed=True)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.spec.outputs[0].name: self._run(self._inputs(feeds)).clone()}

    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        inputs = self._inputs(feeds)
        name = self.spec.outputs[0].name
        buffer = self._run(inputs).clone()
        if self.device == "cpu":

            def run() -> None:
                buffer.copy_(self._run(inputs))

            return Step(run, inputs, {name: buffer})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            buffer = self._run(inputs)
        return Step(graph.replay, inputs, {name: buffer})

    def close(self) -> None:
        self._model = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return self._model(**inputs)

    def _inputs(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the dtypes, layout and sizes that the code was compiled for: it checks none of them itself."""
        feeds = spread_timestep(self.spec, feeds)
        inputs: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for tensor in self.spec.inputs:
            value = feeds[tensor.name].to(self.device, DTYPES[tensor.dtype], copy=True).contiguous()
            fits = value.dim() == len(tensor.axes)
            for axis, size in zip(tensor.axes, value.shape, strict=False):
                fits = fits and size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
            if not fits:
                raise UsageError(f"{tensor.name}: shape {list(value.shape)} found, expected {list(tensor.axes)}")
            inputs[tensor.name] = value
        if not self._profile.holds(sizes):
            raise UsageError(f"sizes {sizes} found, the engine takes {self._profile}")
        return inputs

    def _check_constants(self, source: EngineFile) -> None:
        """torch takes a constant of any shape, and computes rubbish."""
        names = set(self._model.get_constant_fqns())
        dtype = DTYPES[self.spec.outputs[0].dtype]
        for name, tensor in self._constants.items():
            if name not in names:
                raise ArtifactError(f"{source.path}: has no weight {name}; build it again")
            expected = source.record.layers.get(name.removesuffix(".weight"))
            if tuple(tensor.shape) != expected or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ArtifactError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)} given, the engine takes {dtype} {expected}"
                )


@final
class AotInductor(EngineBackend):
    """`torch.export`, compiled to a `.pt2` package for the CPU or GPU that is here; every weight can be replaced."""

    name: ClassVar[str] = "aotinductor"
    builds_from: ClassVar[type[TorchModel] | type[OnnxFile]] = TorchModel
    file_name: ClassVar[str] = "model.pt2"

    def availability(self, device: Device) -> Availability:
        if device == "cuda" and not torch.cuda.is_available():
            return Availability(False, torch.__version__, "this torch sees no CUDA device; use --device cpu")
        return Availability(True, torch.__version__)

    def check(self, options: EngineOptions, form: str) -> EngineOptions:
        for field, name in _NO_NOTION.items():
            if getattr(options, field):
                raise UsageError(f"aotinductor: has no notion of {name}; it compiles for the --device that is here")
        if len(options.profiles) != 1:
            raise UsageError(f"aotinductor: {len(options.profiles)} profiles given, it takes one")
        if form == "factored":
            raise UsageError(
                "aotinductor: compiles merged and swappable models; export without --factored, or with --swappable, "
                "whose adapters are replaced in place too"
            )
        available = self.availability(options.device)
        if not available.ok:
            raise MissingError(f"aotinductor: {available.reason}")
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise MissingError(
                f"aotinductor: no C++ compiler {compiler!r} is here; install g++ (Debian and Ubuntu: apt install g++), "
                "or name one in CXX"
            )
        return options

    def build(
        self, source: TorchModel | OnnxFile, folder: Path, options: EngineOptions, *, progress: Progress = SILENT
    ) -> tuple[EngineRecord, BuildReport]:
        assert isinstance(source, TorchModel)
        start = time.perf_counter()
        (profile,) = options.profiles
        unet: Any = load_unet(source.base, source.dtype, progress=progress)
        merge_into_(unet, source.adapters, progress=progress)
        unet.to(options.device)
        if options.device == "cuda":
            unet.to(memory_format=torch.channels_last)
        spec = unet_spec(source.base.config, source.dtype, timestep_per_sample=source.timestep_per_sample)
        feeds = {n: t.to(options.device) for n, t in random_feeds(spec, profile.opt).items()}
        path = folder / self.file_name
        with _quiet(), _own_cache(), torch.no_grad():
            try:
                with progress.task("export"):
                    shapes = _dynamic_shapes(spec, profile, downscale_of(source.base.config))
                    program = torch.export.export(_Step(unet).eval(), (), feeds, dynamic_shapes=shapes)
                with progress.task("compile"):
                    settings = {"always_keep_tensor_constants": True}
                    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
            except Exception as error:  # torch's compilers raise what they like
                raise ExportError(f"aotinductor: torch does not compile the UNet: {_reason(error)}") from error
            compiled = torch._inductor.aoti_load_package(str(path)).get_metadata()
        target, isa = target_here(options.device)
        isa = compiled.get("AOTI_CPU_ISA", isa) if options.device == "cpu" else None
        record = EngineRecord(
            self.name,
            self.file_name,
            {"torch": torch.__version__},
            (target,),
            options.profiles,
            {"device": options.device, "isa": isa, "inductor": settings},
        )
        return record, BuildReport(time.perf_counter() - start, path.stat().st_size)

    def load(self, source: Source, device: Device) -> Runner:
        assert isinstance(source, EngineFile)
        built = source.record.settings.get("device")
        if built != device:
            raise MissingError(f"aotinductor: the engine was compiled for {built}, use --device {built}")
        ok, reason = self.loads_here(source.record)
        if not ok:
            raise MissingError(f"aotinductor: {reason}")
        return _AotInductorRunner(source, device)

    def loads_here(self, record: EngineRecord) -> tuple[bool, str]:
        built, here = record.runtime.get("torch", ""), torch.__version__
        if built.split(".")[:2] != here.split(".")[:2]:
            return False, f"compiled with torch {built}, {here} is installed; build it again, or install that torch"
        device = record.settings.get("device")
        if device == "cuda" and not torch.cuda.is_available():
            return False, f"compiled for a GPU ({', '.join(record.targets)}), torch sees none here"
        target, isa = target_here("cuda" if device == "cuda" else "cpu")
        if target not in record.targets:
            return False, f"compiled for {', '.join(record.targets)}, {target} is here; build it again on it"
        wanted = record.settings.get("isa")
        if device == "cpu" and _LEVELS.get(str(wanted), 99) > _LEVELS.get(str(isa), 0):
            return False, f"compiled for a CPU with {wanted}, this one has {isa}; build it again on it"
        return True, f"torch {here} and {target} are here"


def _reason(error: Exception) -> str:
    """The first line of what torch says, and of a C++ compiler that failed its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]}: {lines[-1]}" if "compile error" in lines[0] else lines[0]


_LEVELS = {"DEFAULT": 0, "NO AVX": 0, "AVX2": 1, "AVX512": 2}


def target_here(device: Device) -> tuple[str, str | None]:
    """What is compiled for: `sm90`, or the CPU's architecture with its instruction set."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm{major}{minor}", None
    import platform

    return f"cpu-{platform.machine()}", torch.backends.cpu.get_cpu_capability()


def _dynamic_shapes(spec: ModelSpec, profile: Profile, multiple: int) -> dict[str, Any]:
    """The profile's bounds; axes of one size are fixed."""
    dims: dict[str, Any] = {}
    for axis in FREE_AXES:
        least, most = profile.min[axis], profile.max[axis]
        if least == most:
            continue
        if axis in ("height", "width"):
            if least % multiple or most % multiple:
                raise UsageError(f"profile {profile}: {axis} from {least} to {most}, expected multiples of {multiple}")
            dims[axis] = multiple * torch.export.Dim(f"{axis}_over", min=least // multiple, max=most // multiple)
        else:
            dims[axis] = torch.export.Dim(axis, min=least, max=most)
    return {
        tensor.name: {d: dims[axis] for d, axis in enumerate(tensor.axes) if axis in dims} for tensor in spec.inputs
    }


@contextmanager
def _own_cache() -> Iterator[None]:
    """Inductor's cache in a temporary folder, unless the user has chosen one: it grows by a hundred megabytes a build."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    from torch._inductor.utils import fresh_cache

    # torch itself puts its default there
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        yield
        return
    with fresh_cache():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings about its own internals from the user; its errors are raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
