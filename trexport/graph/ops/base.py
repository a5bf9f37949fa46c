"""The contract of a member of trlora's families inside an ONNX graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import onnx_ir as ir
from torch import Tensor

from trexport.errors import ArtifactError
from trexport.graph.ops.body import Body


@dataclass(frozen=True)
class MemberOp(ABC):
    """A member as tensors of fixed shapes: what the graph takes, in the order of the function's inputs."""

    type: ClassVar[str]
    """As in a checkpoint's config."""

    telling: ClassVar[str]
    """A tensor's name that no other op of the same part of a layer has."""

    universal: ClassVar[bool] = False
    """Whether it takes every member of its family, exactly, and not only those of its own type."""

    shapes: Mapping[str, tuple[int, ...]]
    """By name, as a checkpoint names them below `transform.` or `residual.`."""

    @classmethod
    def of(cls, member: Any) -> Self:
        """The op that a trained member of trlora needs."""
        return cls({name: tuple(tensor.shape) for name, tensor in cls.values(member).items()})

    @staticmethod
    @abstractmethod
    def values(member: Any) -> dict[str, Tensor]:
        """A trained member's own tensors, float32, under the names that the graph has for them."""

    @staticmethod
    @abstractmethod
    def restored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A checkpoint's fields and tensors of a member that has the graph's: the inverse of `values`, but for ranks that
        were padded, and rounding.

        Raises:
            ArtifactError: no member has such tensors.
        """

    @property
    @abstractmethod
    def fixed(self) -> Any:
        """What of the shapes must agree: all but the ranks, which may be padded with zeros without changing anything."""

    @abstractmethod
    def neutral(self) -> dict[str, Tensor]:
        """Float32 tensors with which this member changes nothing, to the last bit."""

    @abstractmethod
    def signature(self) -> str:
        """A short name for it, part of the function's name."""

    def tensors(self, member: Any) -> dict[str, Tensor]:
        """A trained member's tensors, float32, padded exactly where its ranks are lower.

        Raises:
            ArtifactError: its modes differ, or its ranks are greater.
        """
        found = {
            name: tensor.cpu() for name, tensor in self.values(member).items()
        }  # a reference may have it on its device
        needed = self.of(member)
        if needed.shapes.keys() != self.shapes.keys() or needed.fixed != self.fixed:
            raise self._does_not_fit(needed)
        try:
            return {name: pad(tensor, self.shapes[name]) for name, tensor in found.items()}
        except ValueError:
            raise self._does_not_fit(needed) from None

    def joined(self, other: MemberOp) -> Self:
        """The smallest op of this type that takes what either takes.

        Raises:
            ArtifactError: there is none.
        """
        if type(self) is not type(other) or self.shapes.keys() != other.shapes.keys() or self.fixed != other.fixed:
            raise ArtifactError(
                f"a {self.type!r} member of shapes {dict(self.shapes)} and a {other.type!r} one of shapes "
                f"{dict(other.shapes)} have no common shape"
            )
        pairs = {name: zip(shape, other.shapes[name], strict=True) for name, shape in self.shapes.items()}
        return type(self)({name: tuple(max(a, b) for a, b in pair) for name, pair in pairs.items()})

    def _does_not_fit(self, needed: MemberOp) -> ArtifactError:
        return ArtifactError(
            f"a {self.type!r} member of shapes {dict(needed.shapes)}, the graph takes {dict(self.shapes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "shapes": {name: list(shape) for name, shape in self.shapes.items()}}


class TransformOp(MemberOp):
    """T of one layer. `values` below are this op's inputs in the order of `shapes`; where the body is stacked, each with a
    leading axis, and so are the results: (stack, rows, features)."""

    @abstractmethod
    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        """`x @ T.T`, x of `rank` dimensions; with `dense`, T is formed first."""

    @abstractmethod
    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value], rank: int = 2) -> ir.Value:
        """`weight @ T`, weight of `rank` dimensions: three where it has the leading axis of a stacked body already."""

    @abstractmethod
    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        """Floating-point operations and elements moved for `rows` rows of activations or of a weight."""


class ResidualOp(MemberOp):
    """Δ of one layer: as the low-rank map that it is, unless a member knows better."""

    has_factors: ClassVar[bool] = True
    """Whether it has `factors`, without which a convolution rebuilds its weight."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """At which it is a low-rank map exactly."""

    @property
    @abstractmethod
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """R (in, r) and L (out, r) with `Δ = L·Rᵀ`, in the model's precision; with a leading axis in a stacked body. For
        members that have no other `apply` and `delta`."""
        raise NotImplementedError(self.type)

    def apply(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], strength: ir.Value) -> ir.Value:
        """`s·x @ Δ.T`, x of `rank` dimensions."""
        right, left = self.factors(body, values)
        # the strength scales the thin tensor in between
        return body.matmul(body.op("Mul", body.matmul(x, right), strength), body.turn(left, [1, 0]))

    def delta(self, body: Body, values: list[ir.Value]) -> ir.Value:
        """Δ, (out, in), in the model's precision; with a leading axis in a stacked body."""
        right, left = self.factors(body, values)
        return body.matmul(left, body.turn(right, [1, 0]))

    def work(self, rows: int) -> float:
        """Floating-point operations of `apply` for `rows` rows of activations."""
        return 2.0 * rows * self.rank * sum(self.features)

    def delta_work(self) -> float:
        """Floating-point operations of `delta`."""
        rows, columns = self.features
        return 2.0 * rows * columns * self.rank


class MagnitudeOp(MemberOp):
    """The gain of one layer's outputs."""

    @property
    def fixed(self) -> Mapping[str, tuple[int, ...]]:
        return self.shapes

    @abstractmethod
    def gain(self, body: Body, whole: ir.Value, values: list[ir.Value]) -> ir.Value:
        """The gains, (out, 1), in the model's precision; with a leading axis in a stacked body.

        Args:
            whole: `W0·T + Δ`, (out, in), in the model's precision.
        """

    @property
    def scales_bias(self) -> bool:
        """Whether the bias takes the gain as well."""
        return False

    def bias_gain(self, body: Body, values: list[ir.Value]) -> ir.Value:
        """The gains of a bias, (out,), in the model's precision, (stack, 1, out) in a stacked body. For members that scale
        it."""
        raise NotImplementedError(self.type)


def pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros after the end of every axis. Raises `ValueError` where the tensor is larger."""
    if tensor.dim() != len(shape) or any(a > b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError
    result = tensor.new_zeros(shape)
    result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result
