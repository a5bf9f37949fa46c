"""The swappable form: a model whose adapted weights may be fed, and `merge.onnx`, which computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import onnx_ir as ir

from trexport.errors import UsageError
from trexport.graph.ops import DOMAIN, VERSION
from trexport.graph.ops.slots import STRENGTH, Slot, joined_slot
from trexport.graph.ops.weight import WeightSignature, weight_function
from trexport.io_spec import Dtype
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.model import beside_weights, offsets_of

MERGE_NAME = "merge.onnx"
ADAPTERS_AXIS = "adapters"


@final
@dataclass(frozen=True)
class SwappableOptions:
    """How to make adapters swappable."""

    blank: bool = False
    """Take the adapters' shapes only, and record none of them."""


@final
@dataclass(frozen=True)
class Swappable:
    """What a swappable artifact takes."""

    slot: Slot
    """The tensors of one adapter. `merge.onnx` takes any number of adapters, stacked along a first axis."""
    blank: bool

    def to_dict(self) -> dict[str, Any]:
        return {"blank": self.blank, "slot": self.slot.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Raises `KeyError` or `TypeError` for what `to_dict` never wrote."""
        return cls(Slot.from_dict(fields["slot"]), fields["blank"])


def plan_swappable(base: Base, adapters: Sequence[BoundAdapter], options: SwappableOptions) -> Swappable:
    """The slot that takes each of some adapters.

    Raises:
        UsageError: no adapter given, or one that changes a bias or a normalisation.
        ArtifactError: adapters that have no common shape.
    """
    if not adapters:
        raise UsageError(
            "--swappable needs an adapter, for its shapes: give one (random:tlora:2:6 has any), --blank it"
        )
    slot = joined_slot([adapter.layers for adapter in adapters])
    others = beside_weights(base, adapters)
    if others:
        raise UsageError(
            f"{others[0]}: an adapter changes it, as (IA)³ does biases outside of feed-forward layers, and a swappable "
            f"model takes other weights only: export it merged{', or --factored' if not offsets_of(adapters) else ''}"
        )
    return Swappable(slot, options.blank)


def merged_name(path: str) -> str:
    """What `merge.onnx` calls the merged weight of a layer; the pristine one has the parameter's name."""
    return f"merged.{path}.weight"


def save_merge_model(source: Path, slot: Slot, dtype: Dtype, opset: int) -> Path:
    """Write `merge.onnx` beside a saved model, with its pristine weights in the model's own data file.

    Inputs: `strength` (adapters,) and the slot's tensors, (adapters, …) each, all float32. Outputs: `merged.<path>.weight`
    for every layer of the slot.
    """
    model = ir.load(source)
    adapters = ir.SymbolicDim(ADAPTERS_AXIS)
    strength = ir.val(STRENGTH, dtype=ir.DataType.FLOAT, shape=ir.Shape([adapters]))
    graph = ir.Graph([strength], [], nodes=[], opset_imports={"": opset, DOMAIN: VERSION}, name="merge")
    functions: dict[str, ir.Function] = {}
    names: dict[str, str] = {}
    for path, layer in slot.layers.items():
        stored = model.graph.initializers[f"{path}.weight"].const_value
        assert stored is not None
        weight_shape = tuple(stored.shape.numpy())
        weight = ir.Value(
            name=f"{path}.weight", type=ir.TensorType(stored.dtype), shape=ir.Shape(weight_shape), const_value=stored
        )
        graph.initializers.add(weight)
        signature = WeightSignature(layer, weight_shape, dtype)
        key = repr(signature)
        if key not in names:
            name, number = signature.name(), 2
            while name in functions:  # ranks that differ in a way the name does not tell
                name, number = f"{signature.name()}_{number}", number + 1
            names[key] = name
            functions[name] = weight_function(signature, name, opset)
        values = []
        for part, op in layer.parts.items():
            for leaf, shape in op.shapes.items():
                axes = ir.Shape([adapters, *shape])
                values.append(ir.val(f"{slot.prefix}{path}.{part}.{leaf}", dtype=ir.DataType.FLOAT, shape=axes))
        graph.inputs.extend(values)
        result = ir.val(merged_name(path), dtype=stored.dtype, shape=ir.Shape(weight_shape))
        graph.append(ir.Node(DOMAIN, names[key], [weight, strength, *values], outputs=[result], name=path))
        graph.outputs.append(result)
    merge = ir.Model(graph, ir_version=model.ir_version, producer_name="trexport", functions=list(functions.values()))
    target = source.with_name(MERGE_NAME)
    ir.save(merge, target)
    return target
