"""The contract of an architecture: one class of models, what goes into it and what comes out."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from trexport.errors import BaseError, UsageError
from trexport.io_spec import Dtype, ModelSpec


@final
@dataclass(frozen=True)
class Limit:
    """What a free axis can be."""

    multiple: int = 1
    most: int | None = None
    """The model takes no more."""
    most_traced: int | None = None
    """Beyond it the model computes another way, so that one graph with the axis free ends here."""


@final
@dataclass(frozen=True)
class Sampling:
    """How a model that denoises is stepped from noise to an image."""

    latents: str
    """The input that is denoised; the model's first output is of its shape."""
    method: str
    """A scheduler of diffusers without noise of its own."""
    config: Mapping[str, Any]
    """The scheduler's, for a model that comes without one."""


FLOW_MATCHING = Sampling(
    # as the transformers of Stable Diffusion 3 and Flux are meant, less what shifts the steps by the picture's size
    "hidden_states",
    "FlowMatchEulerDiscreteScheduler",
    {"num_train_timesteps": 1000, "shift": 3.0},
)


class Architecture(ABC):
    """A model's config, and what follows from it. A new architecture is one file here, one line in the registry, one entry
    in the tests.

    The names of inputs and outputs are optimum's where it has some, and diffusers' otherwise.
    """

    class_name: ClassVar[str]
    """In diffusers or transformers."""
    noun: ClassVar[str]
    """What messages call it."""
    folder: ClassVar[str]
    """Where it lies in a pipeline, and in an artifact."""
    stem: ClassVar[str] = "diffusion_pytorch_model"
    """How the names of its weight files begin."""
    pickle_stem: ClassVar[str] = "diffusion_pytorch_model"
    not_loaded: ClassVar[tuple[str, ...]] = ()
    """The last parts of names in files that are no parameters."""
    random: ClassVar[Mapping[str, Mapping[str, Any]]]
    """`random:NAME` → config."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What the class takes where a config does not say."""
    sampling: ClassVar[Sampling | None] = None
    """None for a model that does not denoise."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """Inputs without a batch axis: the same for all samples."""
    rewritable: ClassVar[bool] = False
    """Whether `trexport.models.fused`, and diffusers' own fusing of projections, know the model."""
    timestep_scale: ClassVar[float] = 1.0
    """What a timestep from 0 to 1000 is multiplied by."""

    @final
    def __init__(self, config: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        """
        Args:
            config: the model's.
            names: of its parameters, as its files have them; empty for the class's own.
        """
        self.names = names
        self.config: Mapping[str, Any] = {**self.defaults, **config}

    @abstractmethod
    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        """The inputs and outputs, the one that is denoised first.

        Args:
            dtype: of all but timesteps, which are float32 in every precision: fractional steps up to 1000 would be rounded
                in half precision.
            sizes: fixes axes by name; those left out stay free.
            timestep_per_sample: `timestep` is (batch,) where it would be one for all samples.
        """

    @abstractmethod
    def default_sizes(self) -> dict[str, int]:
        """Every axis and the size that the model is meant for, in the order in which sizes are written."""

    def limits(self) -> Mapping[str, Limit]:
        """What the axes can be; an axis that is left out can be anything."""
        return {}

    @classmethod
    @abstractmethod
    def arguments(cls, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's `forward` takes: the values of `feeds` put where they belong."""

    @classmethod
    def outputs(cls, result: Any) -> tuple[Tensor, ...]:
        """What `forward` returned, as the outputs of `spec`."""
        return tuple(result)

    @classmethod
    def example(cls, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Something to feed an input with, float32: N(0, 1) where its values mean nothing special."""
        return torch.randn(shape, generator=generator)

    @classmethod
    def rows(cls, feeds: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        """The feeds of some of the samples."""
        return {
            name: tensor if name in cls.shared or not tensor.dim() else tensor[first:last]
            for name, tensor in feeds.items()
        }

    def is_layer(self, path: str) -> bool:
        """Whether a weight of two or four axes is a linear layer's or convolution's, and no table of embeddings."""
        return True

    def sizes(self, given: Mapping[str, int | None]) -> dict[str, int]:
        """Sizes that a user gives, by axis.

        Raises:
            UsageError: an axis that the model does not have.
        """
        known, chosen = self.default_sizes(), {axis: size for axis, size in given.items() if size is not None}
        for axis in chosen:
            if axis not in known:
                raise UsageError(f"{axis} {chosen[axis]} given, a {self.class_name} has the axes {', '.join(known)}")
        return chosen

    def model_class(self) -> Any:
        """The class, imported when it is needed."""
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        import diffusers

        return getattr(diffusers, self.class_name)

    def build(self) -> nn.Module:
        """The model with whatever weights its class begins with, on torch's default device.

        Raises:
            BaseError: the class cannot be built from the config.
        """
        try:
            return self.model_class().from_config(dict(self.config))
        except (ValueError, TypeError, KeyError) as error:
            raise BaseError(f"diffusers cannot build a {self.class_name} from this config: {error}") from error

    @classmethod
    def is_of(cls, model: nn.Module) -> bool:
        """Whether a model in memory is of this architecture."""
        return type(model).__name__ == cls.class_name

    def full_config(self, model: nn.Module) -> dict[str, Any]:
        """The whole config, defaults included, as a `config.json` holds it."""
        config: Any = model.config
        return {**config, "_class_name": self.class_name}


def axes_of(sizes: Mapping[str, int] | None, *names: str) -> list[int | str]:
    """The sizes of some axes where they are fixed, their names where they are free."""
    return [(sizes or {}).get(name, name) for name in names]
