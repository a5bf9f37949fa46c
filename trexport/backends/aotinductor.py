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

A bank's package takes weights as inputs, under their names with `__` for every dot: for every constant that holds adapted
weights a stack of whole ones, the base's own first. `adapter_index` and `adapter_strength` say which each sample takes.

Inputs are contiguous, of the dtypes in the manifest, on the package's device, inside its profile. torch takes constants of a
wrong shape without a word and draws garbage: check them first, as the runner here does. A package is machine code: load only
what you trust.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch
from torch import nn

from trexport.backends.aoti.compiling import Banked, compiled, traced_sizes
from trexport.backends.aoti.runner import MULTIPLE, AotInductorRunner
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
    constants_of,
)
from trexport.cpp_compiler import compiler_name, compiler_path, complaint
from trexport.errors import ExportError, MissingError, UsageError
from trexport.io_spec import banked_spec
from trexport.models.architectures import Limit, spec_of
from trexport.models.bank import Choice, bank_
from trexport.models.fused import fuse_, options_for
from trexport.models.model import DTYPES, load_model, merge_into_, random_feeds
from trexport.models.rows import Rows
from trexport.progress import SILENT, Progress

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


def _cpu_features() -> list[str]:
    """What this CPU can do, by torch's names. The compiler makes code for all of it (`-march=native`)."""
    return sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)


def _target(device: Device) -> str:
    return "cpu" if device == "cpu" else "sm{}{}".format(*torch.cuda.get_device_capability())


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
            raise UsageError("a factored artifact: aotinductor compiles merged and swappable models, and banks")
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
        if source.bank is not None:
            spec = banked_spec(spec)
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
        wanted = replace(options_for(device, DTYPES[source.dtype]), replaceable=frozenset(source.replaceable))
        fused = fuse_(cast(Any, model), wanted) if level else None
        placements = {} if fused is None else fused.placements
        banked = _banked(cast(nn.Module, model), source, placements, device) if source.bank is not None else None
        if device == "cuda":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        feeds = {n: t.to(device) for n, t in random_feeds(spec, traced_sizes(profile)).items()}
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
            joined = compiled(
                cast(nn.Module, model), spec, feeds, profile, multiple, fused, banked, path, settings, progress
            )
        except Exception as error:  # tracer, compiler and linker each have their own
            raise ExportError(f"aotinductor does not compile this model: {_last_words(error)}") from error
        settings |= {"device": device, MULTIPLE: multiple, "optimization_level": level}
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
            placements=placements,
            bank=source.bank,
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
        return AotInductorRunner(source, device)


def _banked(model: nn.Module, source: TorchModel, placements: Mapping[str, Rows], device: Device) -> Banked:
    """The model's adapted layers made to take a weight for every sample."""
    shapes = constants_of(source.replaceable, placements, source.bank)
    choice = Choice()
    bank_(model, shapes, choice)
    weights = {name: torch.zeros(shape, dtype=DTYPES[source.dtype], device=device) for name, shape in shapes.items()}
    return Banked(choice, weights)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
