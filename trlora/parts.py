"""What a checkpoint holds for one layer, before the layer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from torch import Tensor, nn

from trlora.errors import CheckpointError, ShapeError, TrloraError, nearest
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
    output_transform: AbstractTransform | None = None
    kernel: tuple[int | None, ...] | None = None
    """Height and width of the convolution's kernel that it is for, (None, None) for a convolution of any, () for a linear
    layer; None where the checkpoint does not tell."""

    @property
    def members(self) -> dict[str, nn.Module]:
        """The parts that are there, by name."""
        return {part: member for part in PARTS if (member := getattr(self, part)) is not None}

    @property
    def in_features(self) -> int | None:
        """The width of the layer's weight as a matrix; None where only parts of its outputs are stored."""
        if self.residual is not None:
            return self.residual.in_features
        return None if self.transform is None else self.transform.features

    @property
    def out_features(self) -> int | None:
        """None where only a transform is stored, which does not know the layer's outputs."""
        part = self.magnitude if self.residual is None else self.residual
        if part is not None:
            return part.out_features
        return None if self.output_transform is None else self.output_transform.features

    @classmethod
    def of(cls, adapter: LayerAdapter) -> Self:
        """The parts of a layer's adapter that have tensors."""
        members = {part: getattr(adapter, part) for part in PARTS}
        return cls(adapter.spec, **{part: None if member.trivial else member for part, member in members.items()})

    @classmethod
    def from_tensors(
        cls,
        path: str,
        spec: AdapterSpec,
        tensors: Mapping[str, dict[str, Tensor]],
        kernel: tuple[int | None, ...] | None = None,
    ) -> Self:
        """The parts from their tensors, by part and by the name that a checkpoint has for each.

        Args:
            path: the layer's, for messages.

        Raises:
            CheckpointError: one is missing, unknown, contradicts the spec, or does not fit the others.
        """
        members = {part: _member(f"{path}.{part}", getattr(spec, part), dict(tensors.get(part, {}))) for part in PARTS}
        parts = cls(spec, **members, kernel=kernel)
        try:
            parts.check()
        except ShapeError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return parts

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
        turn, rows = self.output_transform, self.out_features
        if turn is not None and rows is not None and turn.fitted(rows, rows) is None:
            raise ShapeError(f"the output transform has {turn.features} features, the others give {rows} outputs")

    def on(self, shape: tuple[int, ...]) -> LayerAdapter:
        """The adapter of a layer whose weight has a shape, (out, in) or (out, in/groups, height, width).

        Raises:
            ShapeError: it does not fit.
        """
        rows, columns, kernel = shape[0], math.prod(shape[1:]), tuple(shape[2:])
        if self.kernel is not None and not _matches(self.kernel, kernel):
            raise ShapeError(f"for {_kind(self.kernel)}, the base's layer is {_kind(kernel)}")
        told = self.residual or self.magnitude  # a transform of outputs may fit several widths
        found = (
            columns if self.residual is None else self.residual.in_features,
            rows if told is None else told.out_features,
        )
        transform = None if self.transform is None else self.transform.fitted(shape[1], columns)
        turn = None if self.output_transform is None else self.output_transform.fitted(rows, rows)
        unfitted = (transform is None) != (self.transform is None) or (turn is None) != (self.output_transform is None)
        if found != (columns, rows) or unfitted:
            inputs = "any" if self.in_features is None else self.in_features
            outputs = "any" if self.out_features is None else self.out_features
            raise ShapeError(f"for {inputs} → {outputs} features, the base's layer has {columns} → {rows}")
        return LayerAdapter.from_parts(self.spec, transform, self.residual, columns, rows, self.magnitude, turn)

    def _fitted(self, features: int) -> AbstractTransform | None:
        assert self.transform is not None
        return self.transform.fitted(self.transform.features, features)


def _matches(wanted: tuple[int | None, ...], kernel: tuple[int, ...]) -> bool:
    return len(wanted) == len(kernel) and all(a in (None, b) for a, b in zip(wanted, kernel, strict=True))


def _kind(kernel: tuple[int | None, ...]) -> str:
    sizes = "" if None in kernel else f" of {'×'.join(map(str, kernel))}"
    return f"a convolution{sizes}" if kernel else "a linear layer"


def _member(name: str, spec: Any, tensors: dict[str, Tensor]) -> Any:
    found, part = sorted(tensors), name.rpartition(".")[2]
    try:
        member = spec.from_tensors(tensors)
    except TrloraError as error:
        raise CheckpointError(f"{name}.{error} (a {spec.type!r} {part})") from error
    if tensors:
        left = sorted(tensors)
        known = [key for key in found if key not in left] or ["none"]
        raise CheckpointError(
            f"{name}.{left[0]}: unknown key for a {spec.type!r} {part}, which takes {', '.join(known)} here"
            f"{nearest(left[0], known)}"
        )
    return member
