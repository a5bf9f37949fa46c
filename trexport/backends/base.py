"""The contract of a backend: is it here, and load a model into a runner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self, final

from torch import Tensor

from trexport.io_spec import Dtype, ModelSpec
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base

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
    release_memory: bool = False
    """Give the memory of intermediate results back after every run, where the runtime keeps it for the next one."""


Source = TorchModel | OnnxFile


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
    consumes: ClassVar[type[TorchModel] | type[OnnxFile]]

    @abstractmethod
    def availability(self, device: Device) -> Availability:
        """Whether it can run on `device` here; cheap, and never raises."""

    @abstractmethod
    def load(self, source: Source, device: Device) -> Runner:
        """Load a model.

        Raises:
            MissingError: the backend is not available, or has no kernels for the model.
        """
