"""What goes into a UNet and what comes out: names, dtypes, named axes. The names are optimum's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, final

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")
BYTES_OF: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

TensorDtype = Dtype | Literal["int64"]
"""What inputs and outputs hold; weights are of a `Dtype`."""

Axis = int | str
"""A fixed size, or the name of an axis that is free; of an output also what follows from one,
`NAME * 8` or `NAME / 8`."""

FREE_AXES = ("batch_size", "height", "width", "sequence_length")

ADAPTER_INDEX, ADAPTER_STRENGTH = "adapter_index", "adapter_strength"
"""What a bank takes beside the UNet's inputs: for each sample the place of its adapter, 0 for none, and its strength."""


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


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    name, sign, factor = axis.partition(" * ") if " * " in axis else axis.partition(" / ")
    if not sign:
        return sizes[name]
    return sizes[name] * int(factor) if sign == " * " else sizes[name] // int(factor)


@final
@dataclass(frozen=True)
class ModelSpec:
    """The inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def free_axes(self) -> tuple[str, ...]:
        """The names of the axes that are not fixed."""
        seen = dict.fromkeys(axis for spec in self.inputs for axis in spec.axes if isinstance(axis, str))
        return tuple(seen)

    def fixed_sizes(self) -> dict[str, int]:
        """The sizes of those of `FREE_AXES` that this model fixes, read off its inputs."""
        by_name = {spec.name: spec for spec in self.inputs}
        sample, context = by_name["sample"].axes, by_name["encoder_hidden_states"].axes
        found = dict(zip(FREE_AXES, (sample[0], sample[2], sample[3], context[1]), strict=True))
        return {name: axis for name, axis in found.items() if isinstance(axis, int)}

    def to_dict(self) -> dict[str, Any]:
        return {"inputs": [s.to_dict() for s in self.inputs], "outputs": [s.to_dict() for s in self.outputs]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        inputs = tuple(TensorSpec.from_dict(entry) for entry in fields["inputs"])
        return cls(inputs, tuple(TensorSpec.from_dict(entry) for entry in fields["outputs"]))


def unet_spec(
    config: Mapping[str, Any],
    dtype: Dtype,
    sizes: Mapping[str, int] | None = None,
    *,
    timestep_per_sample: bool = False,
) -> ModelSpec:
    """The inputs and outputs of a `UNet2DConditionModel`.

    Args:
        config: its diffusers config.
        dtype: of all but `timestep`, which is a float32 scalar in every precision: fractional steps up to 1000 would be
            rounded in half precision.
        sizes: fixes axes by name (see `FREE_AXES`); those left out stay free.
        timestep_per_sample: `timestep` is (batch,), so that samples of one batch may be at different steps.
    """
    sizes = sizes or {}
    batch, height, width, tokens = (sizes.get(axis, axis) for axis in FREE_AXES)
    inputs = [
        TensorSpec("sample", dtype, (batch, config["in_channels"], height, width)),
        TensorSpec("timestep", "fp32", (batch,) if timestep_per_sample else ()),
        TensorSpec("encoder_hidden_states", dtype, (batch, tokens, context_width(config))),
    ]
    if config.get("addition_embed_type") == "text_time":
        time_width = 6 * config["addition_time_embed_dim"]
        text_width = config["projection_class_embeddings_input_dim"] - time_width
        inputs += [TensorSpec("text_embeds", dtype, (batch, text_width)), TensorSpec("time_ids", dtype, (batch, 6))]
    outputs = (TensorSpec("out_sample", dtype, (batch, config["out_channels"], height, width)),)
    return ModelSpec(tuple(inputs), outputs)


def banked_spec(spec: ModelSpec) -> ModelSpec:
    """A UNet's inputs and outputs with a bank of adapters in it: `adapter_index` int64 and `adapter_strength` float32, both
    (batch,)."""
    batch = next(tensor for tensor in spec.inputs if tensor.name == "sample").axes[0]
    added = (TensorSpec(ADAPTER_INDEX, "int64", (batch,)), TensorSpec(ADAPTER_STRENGTH, "fp32", (batch,)))
    return ModelSpec((*spec.inputs, *added), spec.outputs)


def context_width(config: Mapping[str, Any]) -> int:
    """The width of `encoder_hidden_states`."""
    width = config["cross_attention_dim"]
    return width if isinstance(width, int) else width[0]


def default_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes a UNet is meant for: two samples (classifier-free guidance) of its own size, CLIP's 77 tokens."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {"batch_size": 2, "height": height, "width": width, "sequence_length": 77}


def downscale_of(config: Mapping[str, Any]) -> int:
    """What height and width must be a multiple of: two for every level but the last."""
    return 2 ** (len(config["block_out_channels"]) - 1)
