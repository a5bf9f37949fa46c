"""An adapter in memory, before it is on a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, final

from torch import Tensor, nn

from trlora.config import FORMAT, AdapterConfig, BaseModel
from trlora.errors import CheckpointError, ShapeError, nearest
from trlora.inject import adapted_modules
from trlora.layers import LayerAdapter
from trlora.parts import LayerParts
from trlora.spec import AdapterSpec

OFFSET = ".offset"
"""How the key of an offset ends, after the parameter's name."""
COMPONENT = "/"
"""What stands in a key after the name of another model of the pipeline."""


@final
@dataclass(frozen=True)
class Adapter:
    """A checkpoint in memory: its config and, by module path, the members it holds. Valid in itself; `bind` it to a base."""

    config: AdapterConfig
    layers: Mapping[str, LayerParts]
    source: str = "adapter"
    format: str = FORMAT
    """The format that it was read from."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What its source says of where it comes from: kohya's `ss_…`, ModelSpec's `modelspec.…`."""
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    """What is added, times the strength, to parameters of one dimension, by name: biases and weights of normalisations."""
    components: Mapping[str, Adapter] = field(default_factory=dict)
    """What is for other models of the same pipeline, by the name that the pipeline has for each: `text_encoder`, …"""

    @classmethod
    def of(
        cls,
        layers: Mapping[str, LayerParts],
        strength: float = 1.0,
        base_model: BaseModel | None = None,
        source: str = "adapter",
        format: str = FORMAT,
        metadata: Mapping[str, str] | None = None,
        offsets: Mapping[str, Tensor] | None = None,
        components: Mapping[str, Adapter] | None = None,
    ) -> Self:
        """An adapter of layers that are described each by itself: the commonest description becomes the config's default, so
        that it says once what holds for most."""
        counts: dict[AdapterSpec, int] = {}
        for parts in layers.values():
            counts[parts.spec] = counts.get(parts.spec, 0) + 1
        default = max(counts, key=lambda spec: counts[spec], default=AdapterSpec.from_dict({}))
        overrides = {path: parts.spec for path, parts in layers.items() if parts.spec != default}
        config = AdapterConfig(default, overrides, strength, base_model or BaseModel())
        return cls(config, layers, source, format, metadata or {}, offsets or {}, components or {})

    def with_strength(self, strength: float) -> Self:
        """The same at another strength of its own."""
        return replace(self, config=replace(self.config, strength=strength))

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its checkpoint key."""
        result: dict[str, Tensor] = {}
        for path, parts in self.layers.items():
            for part, member in parts.members.items():
                result |= {f"{path}.{part}.{key}": tensor for key, tensor in member.state_dict().items()}
        result |= {f"{name}{OFFSET}": tensor for name, tensor in self.offsets.items()}
        for component, part in self.components.items():
            result |= {f"{component}{COMPONENT}{key}": tensor for key, tensor in part.tensors().items()}
        return result

    def bind(
        self, shapes: Mapping[str, tuple[int, ...]], parameters: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, LayerAdapter]:
        """The layer adapters for a base whose layers have weights of `shapes`: module path → (out, in), or of a convolution
        (out, in/groups, height, width).

        Every tensor is bound to a layer or this fails, so that no adapter silently does nothing.

        Args:
            parameters: all parameters of the base with their shapes, from who adds the `offsets` to them; None from who does
                not.

        Raises:
            CheckpointError: a module or parameter that the base does not have, or one of another shape; offsets that nobody
                adds; components, each of which is an adapter to be bound to its own model.
        """
        if self.components:
            names = ", ".join(sorted(self.components))
            raise CheckpointError(
                f"{self.source}: has parts for {names}, which are models of their own: bind each of adapter.components to "
                "its model, and dataclasses.replace(adapter, components={}) to this one"
            )
        if self.offsets and parameters is None:
            first = sorted(self.offsets)[0]
            raise CheckpointError(
                f"{self.source}: changes {len(self.offsets)} biases and weights of normalisations ({first} first), which "
                "are added to the base and are no part of layers that adapters come to and go from: merge it"
            )
        problems: list[str] = []
        for name, offset in self.offsets.items():
            found = None if parameters is None else parameters.get(name)
            if found is None:
                problems.append(f"{name}: the base has no such parameter")
            elif found != tuple(offset.shape):
                problems.append(f"{name}: the offset has shape {tuple(offset.shape)}, the base's parameter {found}")
        bound: dict[str, LayerAdapter] = {}
        for path, parts in self.layers.items():
            if path not in shapes:
                problems.append(f"{path}: the base has no such linear layer or convolution")
                continue
            try:
                bound[path] = parts.on(shapes[path])
            except ShapeError as error:
                problems.append(f"{path}: {error}")
        if problems:
            path, _, reason = problems[0].partition(":")
            known = parameters or {} if path in self.offsets else shapes
            hint = "" if path in known else nearest(path, known)
            others = _more(problems, [*self.layers, *self.offsets])
            raise CheckpointError(f"{self.source}: does not fit the base: {path}:{reason}{hint}{others}")
        return bound


_SHOWN = 10
"""Problems that a message lists; all are counted."""


def _more(problems: list[str], layers: Sequence[str]) -> str:
    """The problems after the first, where there are any."""
    if len(problems) == 1:
        return ""
    others = "".join(f"\n  {problem}" for problem in problems[1:_SHOWN])
    left = len(problems) - _SHOWN
    more = f"\n  and {left} more" if left > 0 else ""
    return f" (and {len(problems) - 1} more of {len(layers)} layers){others}{more}"


def adapter_from_model(
    model: nn.Module, name: str = "default", *, strength: float = 1.0, base_model: BaseModel | None = None
) -> Adapter:
    """The adapter called `name` of a model, as it would be read back from a checkpoint.

    Raises:
        CheckpointError: the model has no adapter of that name, or it has no parameters.
    """
    layers: dict[str, LayerParts] = {}
    for path, layer in adapted_modules(model).items():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            assert isinstance(adapter, LayerAdapter)
            parts = LayerParts.of(adapter)
            if parts.members:
                layers[path] = parts
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no adapter {name!r} with parameters; use inject_ first")
    return Adapter.of(layers, strength, base_model or BaseModel(class_name=type(model).__name__))
