"""The contract of a backend: is it here, and load a model into a runner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, final

from torch import Tensor

from trexport.errors import UsageError
from trexport.io_spec import Dtype, ModelSpec
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.rows import Rows
from trexport.profile import Profile
from trexport.progress import SILENT, Progress

Device = Literal["cpu", "cuda"]


@final
@dataclass(frozen=True)
class TorchModel:
    """What the torch backends take: a base with adapters."""

    base: Base
    adapters: Sequence[BoundAdapter]
    dtype: Dtype
    factored: bool = False
    """Keep the adapters factored instead of merging them."""
    timestep_per_sample: bool = False
    """`timestep` is (batch,)."""
    bank: int | None = None
    """Take an adapter for every sample, from so many places."""
    replaceable: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of a bank and of a swappable model: layer → shape of its weight."""


@final
@dataclass(frozen=True)
class OnnxFile:
    """What the ONNX backends take: a model file."""

    path: Path
    spec: ModelSpec
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """Bound in every run, beside the inputs of `spec` or in their stead: the cores and strengths of a factored graph, the
    weights of a swappable one, the index of a bank. Those that lie on the runner's device are used where they lie, so that
    who overwrites them changes the next run."""
    graph: bytes | None = None
    """Where it is to differ from the file's; its external data lie beside `path`."""
    release_memory: bool = False
    """Give the memory of intermediate results back after every run, where the runtime keeps it for the next one."""


@final
@dataclass(frozen=True)
class EngineRecord:
    """What a manifest says of an engine: enough to tell whether it will load somewhere, before anyone downloads it."""

    backend: str
    file: str
    """Inside the artifact."""
    runtime: Mapping[str, str]
    """The packages that it was built with and has to be loaded by, and their versions."""
    targets: tuple[str, ...]
    """The devices that it is for: `sm89`, or `cpu`."""
    profiles: tuple[Profile, ...]
    settings: Mapping[str, Any]
    """What the builder was told, by its own names."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Adapted layer → shape of its weight, where adapters may come and go."""
    placements: Mapping[str, Rows] = field(default_factory=dict)
    """Layer → where its weight lies in one that several layers were made into."""
    bank: int | None = None
    """Of an engine that is given whole weights for every sample: how many places there are, beside the base's own."""

    @property
    def device(self) -> Device:
        """The kind of device that it runs on."""
        return "cpu" if self.targets == ("cpu",) else "cuda"

    def constants(self) -> dict[str, tuple[int, ...]]:
        """The weights that may be replaced, by the engine's names, and their shapes: of adapted layers, or those that hold
        them. Of a bank they are stacks, the base's own weight first."""
        return constants_of(self.layers, self.placements, self.bank)

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "file": self.file,
            "runtime": dict(self.runtime),
            "targets": list(self.targets),
            "profiles": [profile.to_dict() for profile in self.profiles],
            "settings": dict(self.settings),
            "layers": {path: list(shape) for path, shape in self.layers.items()},
            "placements": {path: rows.to_list() for path, rows in self.placements.items()},
            "bank": self.bank,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Raises `KeyError` or `TypeError` for what `to_dict` never wrote."""
        return cls(
            backend=fields["backend"],
            file=fields["file"],
            runtime=fields["runtime"],
            targets=tuple(fields["targets"]),
            profiles=tuple(Profile.from_dict(entry) for entry in fields["profiles"]),
            settings=fields["settings"],
            layers={path: tuple(shape) for path, shape in fields["layers"].items()},
            placements={path: Rows(*rows) for path, rows in fields.get("placements", {}).items()},
            bank=fields.get("bank"),
        )


def constants_of(
    layers: Mapping[str, tuple[int, ...]], placements: Mapping[str, Rows], bank: int | None
) -> dict[str, tuple[int, ...]]:
    """As `EngineRecord.constants`, of its fields."""
    found: dict[str, tuple[int, ...]] = {}
    for path, shape in layers.items():
        place = placements.get(path)
        if place is None:
            found[f"{path}.weight"] = shape
        else:
            parts = [other for other in placements.values() if other.constant == place.constant]
            found[place.constant] = (sum(part.rows for part in parts), *shape[1:])
    return found if bank is None else {name: (bank + 1, *shape) for name, shape in found.items()}


@final
@dataclass(frozen=True)
class EngineFile:
    """What the engine backends load."""

    path: Path
    spec: ModelSpec
    record: EngineRecord
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """As those of `OnnxFile`; an engine has no defaults for them."""


@final
@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine. A backend refuses what it has no notion of."""

    profiles: tuple[Profile, ...]
    targets: tuple[str, ...] = ()
    """Devices to build for, for instance `sm89`; none for the one that is here."""
    device: Device = "cpu"
    """Of backends that build for a kind of device only."""
    optimization_level: int | None = None
    """From 0; None for the builder's own. TensorRT knows 0 to 5, AOTInductor 0 to 3."""
    workspace_bytes: int | None = None
    """Scratch memory that layers may use; None for all of the device's."""
    timing_cache: Path | None = None
    """A file with the measured times of kernels, read where it is there, and written."""
    version_compatible: bool = False
    """Loads in newer minor versions of the runtime too."""
    hardware_compatible: Literal["ampere-plus", "same-compute-capability"] | None = None
    refit: Literal["all", "identical"] | None = None
    """Weights may be replaced in the built engine: by any, or by the same ones only (a stripped engine's)."""
    strip: bool = False
    """Leave the weights out; they are put in at the deployment."""


@final
@dataclass(frozen=True)
class BuildReport:
    """What a builder did."""

    seconds: float
    size_bytes: int
    memory_bytes: int | None = None
    """That a run needs beside the weights, where the engine says so."""
    layers: tuple[Mapping[str, Any], ...] = ()
    """One for each layer of the engine: `name`, `type`, `precision`, `fused` (how many of the model's operators it does)."""
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "size_bytes": self.size_bytes,
            "memory_bytes": self.memory_bytes,
            "note": self.note,
            "layers": [dict(layer) for layer in self.layers],
        }


Source = TorchModel | OnnxFile | EngineFile


@final
@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; `reason` says what is missing and what to install."""

    ok: bool
    version: str | None = None
    reason: str | None = None


@final
@dataclass(frozen=True)
class Step:
    """One UNet step on fixed inputs, ready to be run again and again: on CUDA it only queues work on torch's current
    stream. `outputs` are the buffers that each run overwrites; they never alias inputs. Keep the step while it runs: it
    holds the memory of both."""

    run: Callable[[], None]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    note: str | None = None
    """What whoever reads its latency must know."""


class Runner(ABC):
    """A loaded model. Tensors go in and come out on its device. A context manager: leaving it frees the model."""

    spec: ModelSpec
    device: Device

    @abstractmethod
    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Returns new tensors by output name, on the runner's device."""

    @abstractmethod
    def step(self, feeds: Mapping[str, Tensor]) -> Step:
        """Fix the inputs (copied to the device) and prepare for speed: on CUDA, capture a graph."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AbstractBackend(ABC):
    """One engine. See `trexport.backends.BACKENDS`."""

    name: ClassVar[str]
    consumes: ClassVar[type[TorchModel] | type[OnnxFile] | type[EngineFile]]

    @abstractmethod
    def availability(self, device: Device) -> Availability:
        """Whether it can run on `device` here; cheap, and never raises."""

    @abstractmethod
    def load(self, source: Source, device: Device) -> Runner:
        """Load a model.

        Raises:
            MissingError: the backend is not available, or has no kernels for the model.
        """


class EngineBackend(AbstractBackend):
    """A backend whose models are compiled first."""

    consumes: ClassVar[type[TorchModel] | type[OnnxFile] | type[EngineFile]] = EngineFile
    builds_from: ClassVar[type[TorchModel] | type[OnnxFile]]
    file_name: ClassVar[str]
    """Of the engine."""

    @abstractmethod
    def check(self, options: EngineOptions, form: str) -> EngineOptions:
        """The options with defaults filled in; cheap, before anything is written.

        Args:
            form: of the artifact that the engine is to be built from, see `trexport.manifest.Manifest`; `bank` of a bank.

        Raises:
            UsageError: an option that this backend has no notion of, or that cannot be.
            MissingError: the builder is not installed, or cannot do this here.
        """

    @abstractmethod
    def build(
        self,
        source: TorchModel | OnnxFile,
        folder: Path,
        options: EngineOptions,
        *,
        progress: Progress = SILENT,
    ) -> tuple[EngineRecord, BuildReport]:
        """Build `folder/file_name`. The record's `file` is relative to `folder`.

        Args:
            source: what `builds_from` says. The `constants` of an `OnnxFile` become inputs of the engine.
            options: what `check` returned.

        Raises:
            ExportError: the builder refuses the model; its own words are in the message.
        """

    def refit(
        self, source: EngineFile, weights: Mapping[str, Tensor], onnx: Path | None = None, graph: bytes | None = None
    ) -> bytes:
        """The engine with other weights.

        Args:
            weights: by parameter name, on the CPU, in the engine's dtype.
            onnx: a model to take every weight from first, for an engine that was built without them.
            graph: that model's graph as the engine was built from it.

        Raises:
            UsageError: engines of this backend are not refitted.
            MissingError: no device here that the engine is for.
            ExportError: the engine refuses a weight.
        """
        raise UsageError(
            f"{self.name}: its engines are not refitted; --swappable has weights that are replaced in place"
        )

    @abstractmethod
    def loads_here(self, record: EngineRecord) -> tuple[bool, str]:
        """Whether an engine would load on this machine, and why; from its record alone, nothing is loaded."""
