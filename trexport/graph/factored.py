"""The factored form: what `trexport onnx --factored` decides before it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

from torch import Tensor

from trexport.errors import UsageError
from trexport.graph.ops.plan import COST_MODELS, LayerPlan, Path, plan_layer
from trexport.graph.ops.slots import Slot, banked, joined_slot, slots_for
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.model import offsets_of, rows_of_layers


@final
@dataclass(frozen=True)
class FactoredOptions:
    """How to keep adapters factored."""

    blank: bool = False
    """Take the adapters' shapes only: identity, zero and strength 1 are the defaults, and the model is the base."""
    path: Path | None = None
    """Compute every layer this way; None plans each."""
    bank: int | None = None
    """Places for so many adapters in one graph, of which every sample of a batch takes its own; None for adapters that all
    samples share."""
    plan_for: str = "cpu"
    """The device whose costs the plan weighs, of `trexport.graph.ops.plan.COST_MODELS`."""


@final
@dataclass(frozen=True)
class Factored:
    """What a factored graph takes, and how it computes."""

    slots: Sequence[Slot]
    """One for each adapter at once; of a bank the only one, which is that of every place."""
    plan: Mapping[str, LayerPlan]
    optimum: Mapping[str, int]
    """The sizes that the plan is made for."""
    plan_for: str
    blank: bool
    bank: int | None = None
    """The places of a bank. Its tensors are stacked along a first axis of one more: place 0 is for no adapter."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "blank": self.blank,
            "bank": self.bank,
            "plan_for": self.plan_for,
            "optimum": dict(self.optimum),
            "plan": {path: layer.to_dict() for path, layer in self.plan.items()},
            "slots": [slot.to_dict() for slot in self.slots],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Raises `KeyError` or `TypeError` for what `to_dict` never wrote."""
        plan = {path: LayerPlan.from_dict(layer) for path, layer in fields["plan"].items()}
        slots = [Slot.from_dict(slot) for slot in fields["slots"]]
        return cls(slots, plan, fields["optimum"], fields["plan_for"], fields["blank"], fields.get("bank"))


def plan_factored(
    base: Base, adapters: Sequence[BoundAdapter], optimum: Mapping[str, int], options: FactoredOptions
) -> Factored:
    """Slots for the adapters, and the path of every layer they are on.

    Args:
        optimum: sizes of all free axes.

    Raises:
        UsageError: no adapter given, more than a bank holds, an unknown `plan_for`, adapters on biases or normalisations, or
            a bank on convolutions.
        ArtifactError: adapters that cannot share a bank.
    """
    if not adapters:
        raise UsageError("--factored needs an adapter, for its shapes: give one (random:tlora:2:6 has any), --blank it")
    if options.plan_for not in COST_MODELS:
        raise UsageError(f"no cost model {options.plan_for!r}, expected one of {sorted(COST_MODELS)}")
    if options.bank is not None and not 1 <= len(adapters) <= options.bank:
        raise UsageError(f"{len(adapters)} adapters given for a bank of {options.bank}; give --bank {len(adapters)}")
    added = offsets_of(adapters)
    if added:
        raise UsageError(
            f"{len(added)} biases and weights of normalisations are changed ({next(iter(added))} the first), which no graph "
            "keeps factored: export merged"
        )
    given = [adapter.layers for adapter in adapters]
    slots = slots_for(given) if options.bank is None else [joined_slot(given)]
    shapes = base.weight_shapes()
    paths = [path for path in shapes if any(path in slot.layers for slot in slots)]
    convolutions = [path for path in paths if len(shapes[path]) != 2]
    if convolutions and options.bank is not None:
        raise UsageError(
            f"{len(convolutions)} adapted layers are convolutions ({convolutions[0]} the first), which take one weight for "
            "all samples: export without --bank, or --swappable"
        )
    rows = rows_of_layers(base, optimum, paths)
    model = COST_MODELS[options.plan_for]
    plan = {}
    for path in paths:
        on_layer = [slot.layers[path] for slot in slots if path in slot.layers]
        samples = 1 if options.bank is None else optimum["batch_size"]
        plan[path] = plan_layer(on_layer, shapes[path], rows[path], model, options.path, samples)
    return Factored(slots, plan, dict(optimum), options.plan_for, options.blank, options.bank)


def tensors_of(factored: Factored, adapters: Sequence[BoundAdapter]) -> dict[str, Tensor]:
    """The graph's inputs for adapters, the k-th in the k-th slot; slots that are left are at strength zero.

    Of a bank, the stacks: place 0 is neutral, the k-th adapter, counted from 1, is in place k, neutral places after them;
    strengths are not in it.

    Raises:
        UsageError: more adapters than slots.
        ArtifactError: an adapter does not fit its slot.
    """
    slots, bank = factored.slots, factored.bank
    if len(adapters) > (bank or len(slots)):
        raise UsageError(f"{len(adapters)} adapters given, the graph takes {bank or len(slots)} at once")
    tensors: dict[str, Tensor] = {}
    if bank is not None:
        (slot,) = slots
        return banked(slot, [slot.tensors(a.layers, a.strength, a.name) for a in adapters], bank)
    for number, slot in enumerate(slots):
        if number < len(adapters):
            adapter = adapters[number]
            tensors |= slot.tensors(adapter.layers, adapter.strength, adapter.name)
        else:
            tensors |= slot.tensors({}, 0.0, "none")
    return tensors


def default_tensors(factored: Factored, adapters: Sequence[BoundAdapter]) -> dict[str, Tensor]:
    """What the graph holds where nothing is fed."""
    if not factored.blank:
        return tensors_of(factored, adapters)
    if factored.bank is not None:
        return banked(factored.slots[0], [], factored.bank)
    tensors: dict[str, Tensor] = {}
    for slot in factored.slots:
        tensors |= slot.neutral()
    return tensors
