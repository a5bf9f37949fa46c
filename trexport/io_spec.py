"""What goes into a model and what comes out: names, dtypes, named axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, final

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")
BYTES_OF: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

TensorDtype = Dtype | Literal["int64"]
"""What inputs and outputs hold; weights are of a `Dtype`."""

Axis = int | str
"""A fixed size, or the name of an axis that is free, or what follows from one, `NAME * 8` or `NAME / 8`."""

ADAPTER_INDEX, ADAPTER_STRENGTH = "adapter_index", "adapter_strength"
"""What a bank takes beside the model's inputs: for each sample the place of its adapter, 0 for none, and its strength."""


@final
@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: TensorDtype
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the free axes set. Raises `KeyError` for one that `sizes` lacks."""
        return tuple(axis if isinstance(axis, int) else _size(axis, sizes) for axis in self.axes)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "axes": list(self.axes)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(fields["name"], fields["dtype"], tuple(fields["axes"]))


def parts_of(axis: str) -> tuple[str, int, int]:
    """The name in an axis, and what its size is multiplied and divided by."""
    name, times, factor = axis.partition(" * ")
    if times:
        return name, int(factor), 1
    name, over, factor = axis.partition(" / ")
    return name, 1, int(factor) if over else 1


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    name, times, over = parts_of(axis)
    return sizes[name] * times // over


@final
@dataclass(frozen=True)
class ModelSpec:
    """The inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    """The first axis of the first one is the batch."""
    outputs: tuple[TensorSpec, ...]
    fixed: Mapping[str, int] = field(default_factory=dict)
    """The axes that are fixed, by name."""
    model: str = ""
    """The class of the model, of `trexport.models.architectures.ARCHITECTURES`; empty for others."""

    @property
    def free_axes(self) -> tuple[str, ...]:
        """The names of the axes that are not fixed."""
        axes = (axis for spec in self.inputs for axis in spec.axes if isinstance(axis, str))
        return tuple(dict.fromkeys(parts_of(axis)[0] for axis in axes))

    @property
    def batch(self) -> Axis:
        """The axis of the samples."""
        return self.inputs[0].axes[0]

    def fixed_sizes(self) -> dict[str, int]:
        """The axes that this model fixes, and their sizes."""
        return dict(self.fixed)

    def to_dict(self) -> dict[str, Any]:
        tensors = {"inputs": [s.to_dict() for s in self.inputs], "outputs": [s.to_dict() for s in self.outputs]}
        return tensors | {"fixed": dict(self.fixed), "model": self.model}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        inputs = tuple(TensorSpec.from_dict(entry) for entry in fields["inputs"])
        outputs = tuple(TensorSpec.from_dict(entry) for entry in fields["outputs"])
        if "model" not in fields:  # written when there were UNets only
            return cls(inputs, outputs, _fixed_of_unet(inputs), "UNet2DConditionModel")
        return cls(inputs, outputs, fields["fixed"], fields["model"])


def _fixed_of_unet(inputs: tuple[TensorSpec, ...]) -> dict[str, int]:
    axes = {tensor.name: tensor.axes for tensor in inputs}
    if "sample" not in axes or "encoder_hidden_states" not in axes:  # another model of a pipeline
        return {}
    batch, _, height, width = axes["sample"]
    sizes = {"batch_size": batch, "height": height, "width": width, "sequence_length": axes["encoder_hidden_states"][1]}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def banked_spec(spec: ModelSpec) -> ModelSpec:
    """A model's inputs and outputs with a bank of adapters in it: `adapter_index` int64 and `adapter_strength` float32, both
    (batch,)."""
    added = (TensorSpec(ADAPTER_INDEX, "int64", (spec.batch,)), TensorSpec(ADAPTER_STRENGTH, "fp32", (spec.batch,)))
    return replace(spec, inputs=(*spec.inputs, *added))
