"""An adapter in memory, before it is on a base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

from torch import Tensor, nn

from trlora.config import AdapterConfig, BaseModel
from trlora.errors import CheckpointError, ShapeError, nearest
from trlora.inject import adapted_modules
from trlora.layers import LayerAdapter
from trlora.magnitudes import AbstractMagnitude
from trlora.residuals import AbstractResidual
from trlora.spec import PARTS, AdapterSpec
from trlora.transforms import AbstractTransform


@final
@dataclass(frozen=True)
class LayerParts:
    """What a checkpoint holds for one layer; a part without tensors is None."""

    spec: AdapterSpec
    transform: AbstractTransform | None
    residual: AbstractResidual | None
    magnitude: AbstractMagnitude | None = None
    kernel: tuple[int, ...] | None = None
    """Height and width of the convolution's kernel that it is for, () for a linear layer; None where the checkpoint does not
    tell."""

    @property
    def members(self) -> dict[str, nn.Module]:
        """The parts that are there, by name."""
        found = {"transform": self.transform, "residual": self.residual, "magnitude": self.magnitude}
        return {part: found[part] for part in PARTS if found[part] is not None}  # type: ignore[misc]

    @property
    def in_features(self) -> int | None:
        """The width of the layer's weight as a matrix; None where only a magnitude is stored."""
        if self.residual is not None:
            return self.residual.in_features
        return None if self.transform is None else self.transform.features

    @property
    def out_features(self) -> int | None:
        """None where only a transform is stored, which does not know the layer's outputs."""
        part = self.magnitude if self.residual is None else self.residual
        return None if part is None else part.out_features

    @classmethod
    def of(cls, adapter: LayerAdapter) -> Self:
        """The parts of a layer's adapter that have tensors."""
        transform, residual, magnitude = adapter.transform, adapter.residual, adapter.magnitude
        return cls(
            adapter.spec,
            None if transform.trivial else transform,
            None if residual.trivial else residual,
            None if magnitude.trivial else magnitude,
        )

    def check(self) -> None:
        """Raises `ShapeError` where the parts do not fit together on any layer."""
        transform, residual, magnitude = self.transform, self.residual, self.magnitude
        # as on a convolution whose channels the transform tells, for that is all it may know
        if transform is not None and residual is not None and self._fitted(residual.in_features) is None:
            raise ShapeError(
                f"the transform has {transform.features} features, the residual takes {residual.in_features}"
            )
        if magnitude is not None and residual is not None and magnitude.out_features != residual.out_features:
            raise ShapeError(
                f"the magnitude has {magnitude.out_features} outputs, the residual gives {residual.out_features}"
            )

    def on(self, shape: tuple[int, ...]) -> LayerAdapter:
        """The adapter of a layer whose weight has a shape, (out, in) or (out, in/groups, height, width).

        Raises:
            ShapeError: it does not fit.
        """
        rows, columns, kernel = shape[0], math.prod(shape[1:]), tuple(shape[2:])
        if self.kernel is not None and self.kernel != kernel:
            raise ShapeError(f"for {_kind(self.kernel)}, the base's layer is {_kind(kernel)}")
        found = (
            columns if self.residual is None else self.residual.in_features,
            rows if self.out_features is None else self.out_features,
        )
        transform = None if self.transform is None else self.transform.fitted(shape[1], columns)
        if found != (columns, rows) or (transform is None) != (self.transform is None):
            inputs = "any" if self.in_features is None else self.in_features
            outputs = "any" if self.out_features is None else self.out_features
            raise ShapeError(f"for {inputs} → {outputs} features, the base's layer has {columns} → {rows}")
        return LayerAdapter.from_parts(self.spec, transform, self.residual, columns, rows, self.magnitude)

    def _fitted(self, features: int) -> AbstractTransform | None:
        assert self.transform is not None
        return self.transform.fitted(self.transform.features, features)


def _kind(kernel: tuple[int, ...]) -> str:
    return f"a convolution of {'×'.join(map(str, kernel))}" if kernel else "a linear layer"


@final
@dataclass(frozen=True)
class Adapter:
    """A checkpoint in memory: its config and, by module path, the members it holds. Valid in itself; `bind` it to a base."""

    config: AdapterConfig
    layers: Mapping[str, LayerParts]
    source: str = "adapter"

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
        return result

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LayerAdapter]:
        """The layer adapters for a base whose layers have weights of `shapes`: module path → (out, in), or of a convolution
        (out, in/groups, height, width).

        Every tensor is bound to a layer or this fails, so that no adapter silently does nothing.

        Raises:
            CheckpointError: a module that the base does not have, or one of another shape.
        """
        problems: list[str] = []
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
            hint = "" if path in shapes else nearest(path, shapes)
            others = _more(problems, self.layers)
            raise CheckpointError(f"{self.source}: does not fit the base: {path}:{reason}{hint}{others}")
        return bound


_SHOWN = 10
"""Problems that a message lists; all are counted."""


def _more(problems: list[str], layers: Mapping[str, LayerParts]) -> str:
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
    specs: dict[str, AdapterSpec] = {}
    layers: dict[str, LayerParts] = {}
    for path, layer in adapted_modules(model).items():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            assert isinstance(adapter, LayerAdapter)
            parts = LayerParts.of(adapter)
            if parts.members:
                specs[path] = adapter.spec
                layers[path] = parts
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no adapter {name!r} with parameters; use inject_ first")
    # the commonest description is the default, so that the config says once what holds for most layers
    counts: dict[AdapterSpec, int] = {}
    for spec in specs.values():
        counts[spec] = counts.get(spec, 0) + 1
    default = max(counts, key=lambda spec: counts[spec])
    config = AdapterConfig(
        default=default,
        overrides={path: spec for path, spec in specs.items() if spec != default},
        strength=strength,
        base_model=base_model or BaseModel(class_name=type(model).__name__),
    )
    return Adapter(config, layers)
