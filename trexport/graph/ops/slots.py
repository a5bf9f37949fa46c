"""Slots: places for adapters in an exported graph, of fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.errors import ArtifactError
from trexport.graph.ops import (
    MAGNITUDE_OPS,
    RESIDUAL_OPS,
    TRANSFORM_OPS,
    MagnitudeOp,
    MemberOp,
    ResidualOp,
    TransformOp,
)
from trexport.graph.ops.low_rank import LowRankOp
from trlora import LayerAdapter
from trlora.errors import nearest
from trlora.spec import PARTS

_OPS: dict[str, Any] = {
    "transform": TRANSFORM_OPS,
    "residual": RESIDUAL_OPS,
    "magnitude": MAGNITUDE_OPS,
    "output_transform": TRANSFORM_OPS,
}

STRENGTH = "strength"
INDEX = "index"


def _members(adapter: LayerAdapter) -> dict[str, tuple[Any, str]]:
    """The members of an adapter and their types, by part."""
    return {part: (getattr(adapter, part), getattr(adapter.spec, part).type) for part in PARTS}


@final
@dataclass(frozen=True)
class LayerSlot:
    """What one layer takes of one adapter."""

    transform: TransformOp | None
    residual: ResidualOp | None
    magnitude: MagnitudeOp | None = None
    output_transform: TransformOp | None = None

    @classmethod
    def of(cls, adapter: LayerAdapter) -> Self:
        """The slot that an adapter of a layer needs.

        Raises:
            ArtifactError: no graph takes one of its parts.
        """
        return cls(
            **{
                part: None if member.trivial else _OPS[part][kind].of(member)
                for part, (member, kind) in _members(adapter).items()
            }
        )

    def joined(self, other: LayerSlot) -> Self:
        """The smallest slot that takes what either takes; residuals of different types meet as low-rank maps, exactly.

        Raises:
            ArtifactError: their transforms, or their magnitudes, have no common shape.
        """
        transform, residual = self.transform or other.transform, self.residual or other.residual
        if self.transform is not None and other.transform is not None:
            transform = self.transform.joined(other.transform)
        if self.residual is not None and other.residual is not None:
            try:
                residual = self.residual.joined(other.residual)
            except ArtifactError:
                residual = LowRankOp.holding([self.residual, other.residual])
        magnitude = self.magnitude or other.magnitude
        if self.magnitude is not None and other.magnitude is not None:
            magnitude = self.magnitude.joined(other.magnitude)
        turn = self.output_transform or other.output_transform
        if self.output_transform is not None and other.output_transform is not None:
            turn = self.output_transform.joined(other.output_transform)
        return type(self)(transform, residual, magnitude, turn)

    @property
    def parts(self) -> dict[str, MemberOp]:
        """The members that are there, by their part of a key."""
        return {part: op for part in PARTS if (op := getattr(self, part)) is not None}

    @property
    def outside(self) -> bool:
        """Whether something stands outside of the layer's own product, so that its weight has to be rebuilt."""
        return self.magnitude is not None or self.output_transform is not None

    def split(self, values: Sequence[ir.Value]) -> dict[str, list[ir.Value]]:
        """Values in the order of `names`, by part."""
        rest = iter(values)
        return {part: [next(rest) for _ in op.shapes] for part, op in self.parts.items()}

    def names(self) -> list[str]:
        """The inputs in their order, as a checkpoint names them below a layer's path."""
        return [f"{part}.{name}" for part, op in self.parts.items() for name in op.shapes]

    def neutral(self) -> dict[str, Tensor]:
        """Tensors that change nothing."""
        return {f"{part}.{name}": t for part, op in self.parts.items() for name, t in op.neutral().items()}

    def tensors(self, adapter: LayerAdapter) -> dict[str, Tensor]:
        """An adapter's tensors, in the shapes of this slot.

        Raises:
            ArtifactError: they do not fit.
        """
        result = self.neutral()
        for part, (member, kind) in _members(adapter).items():
            if member.trivial:
                continue
            op = self.parts.get(part)
            if op is None or not (op.universal or op.type == kind):
                takes = "none" if op is None else repr(op.type)
                raise ArtifactError(f"a {kind!r} {part} found, the graph takes {takes} there")
            result |= {f"{part}.{name}": tensor for name, tensor in op.tensors(member).items()}
        return result

    def signature(self) -> str:
        return "_".join(
            f"Output{op.signature()}" if part == "output_transform" else op.signature()
            for part, op in self.parts.items()
        )


@final
@dataclass(frozen=True)
class Slot:
    """A place for one adapter: its layers, and the prefix of its inputs' names."""

    prefix: str
    layers: Mapping[str, LayerSlot]

    @property
    def strength(self) -> str:
        """The input that scales the adapter, float32 of shape (1,): ONNX Runtime's adapter files hold no scalars."""
        return f"{self.prefix}{STRENGTH}"

    def neutral(self) -> dict[str, Tensor]:
        """Identity, zero, and strength 1, by input name."""
        tensors = {self.strength: torch.ones(1)}
        for path, layer in self.layers.items():
            tensors |= {f"{self.prefix}{path}.{name}": tensor for name, tensor in layer.neutral().items()}
        return tensors

    def tensors(self, layers: Mapping[str, LayerAdapter], strength: float, source: str) -> dict[str, Tensor]:
        """An adapter as this slot's inputs: float32, layers that it lacks neutral.

        Raises:
            ArtifactError: a layer that the slot lacks, or a member that does not fit.
        """
        tensors = self.neutral() | {self.strength: torch.tensor([strength], dtype=torch.float32)}
        for path, adapter in layers.items():
            if path not in self.layers:
                raise ArtifactError(
                    f"{source}: adapts {path}, where the graph takes no adapter{nearest(path, self.layers)}"
                )
            try:
                found = self.layers[path].tensors(adapter)
            except ArtifactError as error:
                raise ArtifactError(f"{source}: {path}: {error}; export for this adapter's shapes") from error
            tensors |= {f"{self.prefix}{path}.{name}": tensor for name, tensor in found.items()}
        return tensors

    def to_dict(self) -> dict[str, Any]:
        layers = {path: {part: op.to_dict() for part, op in layer.parts.items()} for path, layer in self.layers.items()}
        return {"prefix": self.prefix, "layers": layers}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Raises `KeyError` or `TypeError` for what `to_dict` never wrote."""

        def op(entry: Mapping[str, Any] | None, registry: Mapping[str, type[Any]]) -> Any:
            if entry is None:
                return None
            return registry[entry["type"]]({name: tuple(shape) for name, shape in entry["shapes"].items()})

        layers = {
            path: LayerSlot(
                **{part: op(parts.get(part), registry) for part, registry in _OPS.items()},
            )
            for path, parts in fields["layers"].items()
        }
        return cls(fields["prefix"], layers)


def banked(slot: Slot, adapters: Sequence[Mapping[str, Tensor]], places: int) -> dict[str, Tensor]:
    """The stacks of a bank: a neutral place for samples without an adapter, then `places` for adapters, those that are left
    neutral. The first is there because strength zero alone would not silence an adapter whose products overflow."""
    neutral = slot.neutral()
    return stacked(slot, [neutral, *adapters], 1 + places)


def stacked(slot: Slot, adapters: Sequence[Mapping[str, Tensor]], places: int) -> dict[str, Tensor]:
    """Adapters' tensors along a new first axis, neutral ones in the places that are left; strengths are not in it.

    Args:
        adapters: what `slot.tensors` gave for each.
    """
    neutral = slot.neutral()
    del neutral[slot.strength]
    return {
        name: torch.stack([*(adapter[name] for adapter in adapters), *[tensor] * (places - len(adapters))])
        for name, tensor in neutral.items()
    }


def slots_for(adapters: Sequence[Mapping[str, LayerAdapter]]) -> list[Slot]:
    """A slot for each adapter. A single one's inputs have a checkpoint's own keys and `strength`; of several, those of the
    k-th have `adapter_<k>.` before them."""
    prefixes = [""] if len(adapters) == 1 else [f"adapter_{k}." for k in range(len(adapters))]
    return [
        Slot(prefix, {path: LayerSlot.of(adapter) for path, adapter in layers.items()})
        for prefix, layers in zip(prefixes, adapters, strict=True)
    ]


def joined_slot(adapters: Sequence[Mapping[str, LayerAdapter]]) -> Slot:
    """The smallest slot that takes each of several adapters: a checkpoint's own keys, the greatest ranks.

    Raises:
        ArtifactError: they have no common shape on some layer.
    """
    layers: dict[str, LayerSlot] = {}
    for adapter in adapters:
        for path, layer in adapter.items():
            slot = LayerSlot.of(layer)
            try:
                layers[path] = layers[path].joined(slot) if path in layers else slot
            except ArtifactError as error:
                raise ArtifactError(f"{path}: {error}; export the adapters apart") from error
    return Slot("", layers)
