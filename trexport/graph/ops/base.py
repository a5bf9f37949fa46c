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

    shapes: Mapping[str, tuple[int, ...]]
    """By name, as a checkpoint names them below `transform.` or `residual.`."""

    @classmethod
    @abstractmethod
    def of(cls, member: Any) -> Self:
        """The op that a trained member of trlora needs."""

    @abstractmethod
    def neutral(self) -> dict[str, Tensor]:
        """Float32 tensors with which this member changes nothing, to the last bit."""

    @abstractmethod
    def tensors(self, member: Any) -> dict[str, Tensor]:
        """A trained member's tensors, float32, padded exactly where its ranks are lower.

        Raises:
            ArtifactError: its modes differ, or its ranks are greater.
        """

    @abstractmethod
    def signature(self) -> str:
        """A short name for it, part of the function's name."""

    def does_not_fit(self, found: Mapping[str, Tensor]) -> ArtifactError:
        """The refusal of a member with tensors `found`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        return ArtifactError(f"a {self.type!r} member of shapes {shapes}, the graph takes {dict(self.shapes)}")

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "shapes": {name: list(shape) for name, shape in self.shapes.items()}}


class TransformOp(MemberOp):
    """T of one layer. `values` below are this op's inputs in the order of `shapes`."""

    @abstractmethod
    def activations(self, body: Body, x: ir.Value, rank: int, values: list[ir.Value], *, dense: bool) -> ir.Value:
        """`x @ T.T`, x of `rank` dimensions; with `dense`, T is formed first."""

    @abstractmethod
    def weight(self, body: Body, weight: ir.Value, values: list[ir.Value]) -> ir.Value:
        """`weight @ T`."""

    @abstractmethod
    def work(self, rows: int, *, dense: bool) -> tuple[float, float]:
        """Floating-point operations and elements moved for `rows` rows of activations or of a weight."""


class ResidualOp(MemberOp):
    """Δ of one layer, as the low-rank map that it is."""

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @abstractmethod
    def factors(self, body: Body, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """R (in, r) and L (out, r) with `Δ = L·Rᵀ`, in the model's precision."""


def pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros after the end of every axis. Raises `ValueError` where the tensor is larger."""
    if tensor.dim() != len(shape) or any(a > b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError
    result = tensor.new_zeros(shape)
    result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result
