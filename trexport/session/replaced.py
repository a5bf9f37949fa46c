"""Weights that are written in place: of swappable models and engines, and of factored ones in the place of their cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trexport.artifact import ADAPTED_NAME, Artifact
from trexport.backends import Device
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import Slot
from trexport.graph.passes.written_bank import change_name
from trexport.models.adapters import BoundAdapter
from trexport.models.rows import Rows
from trexport.session.form import AdapterForm, PlacedBank, Prepared, placed
from trlora.layers import weight_change
from trlora.swap import PreparedAdapter, SwapReport, WeightWriter


@final
class ReplacedForm(AdapterForm):
    """The adapted weights are the buffers: activating adapters writes `W0·(I + Σ s_k (T_k − I)) + Σ s_k Δ_k` into them, from
    the pristine weights on the same device, rounded once. `trlora.swap` does it; `report` tells how the last time.

    Args:
        slot: the place for adapters.
        pristine: layer path → W0, of the slot's layers and of those that lie in one constant with them.
        placements: of layers whose weight is a part of a greater constant.
    """

    def __init__(
        self,
        slot: Slot,
        pristine: Mapping[str, Tensor],
        device: Device,
        placements: Mapping[str, Rows] | None = None,
    ) -> None:
        self._slot = slot
        places = placements or {}
        on_device = {path: tensor.to(device) for path, tensor in pristine.items()}
        self.buffers = {f"{path}.weight": on_device[path].clone() for path in slot.layers if path not in places}
        written = {path: self.buffers[f"{path}.weight"] for path in slot.layers if path not in places}
        for constant in dict.fromkeys(places[path].constant for path in slot.layers if path in places):
            members = sorted((rows.first, path) for path, rows in places.items() if rows.constant == constant)
            self.buffers[constant] = torch.cat([on_device[path] for _, path in members])
            for first, path in members:
                if path in slot.layers:
                    written[path] = self.buffers[constant][first : first + places[path].rows]
        self._writer = WeightWriter({path: on_device[path] for path in written}, written)
        self._report: SwapReport | None = None

    @property
    def report(self) -> SwapReport | None:
        return self._report

    def slots(self) -> Sequence[Slot]:
        return [self._slot]

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        return replace(super().prepare(name, adapter), on_device=self.on_device(adapter))

    def on_device(self, adapter: BoundAdapter) -> PreparedAdapter:
        """An adapter where its weights are written."""
        return self._writer.prepare(adapter.layers)

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        pairs = [(_on_device(prepared), strength) for prepared, strength in active]
        self._report = self._writer.write(pairs)
        wrong = self._writer.not_finite(pairs)
        finish(self.buffers)
        if wrong is not None:
            given = {prepared.name: strength for prepared, strength in active}
            raise ArtifactError(
                f"{wrong}.weight: not finite with {given}; the strengths are too great for this precision"
            )


@final
class WrittenForm(AdapterForm):
    """A factored model with fed weights in the place of cores, written as by `ReplacedForm` when adapters are activated:
    computing with cores in every step takes a GPU many small kernels a layer.

    Args:
        slots: of the factored artifact. What fits them is taken, and no more at once.
        pristine, device: as of `ReplacedForm`, of the layers of all slots.
        graph: the model's, as `trexport.graph.passes.written` makes it.
    """

    def __init__(self, slots: Sequence[Slot], pristine: Mapping[str, Tensor], device: Device, graph: bytes) -> None:
        self._slots = slots
        every = Slot("", {path: layer for slot in slots for path, layer in slot.layers.items()})
        self._replaced = ReplacedForm(every, pristine, device)
        self.buffers = self._replaced.buffers
        self.graph = graph

    @property
    def report(self) -> SwapReport | None:
        return self._replaced.report

    def slots(self) -> Sequence[Slot]:
        return self._slots

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        return replace(super().prepare(name, adapter), on_device=self._replaced.on_device(adapter))

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        placed(active, self._slots)
        self._replaced.write(active)


class CopiedForm(AdapterForm):
    """Stacks of whole weights are the buffers: what `ReplacedForm` writes is copied into them."""

    _one: ReplacedForm

    @property
    def report(self) -> SwapReport | None:
        return self._one.report

    def slots(self) -> Sequence[Slot]:
        return self._one.slots()

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        return self._one.prepare(name, adapter)

    def stacks(self, rows: int) -> list[Tensor]:
        """New ones of the base's weights, in the order of what is written."""
        return [weight.expand(rows, *weight.shape).clone() for weight in self._one.buffers.values()]

    def copy(self, rows: Sequence[int]) -> None:
        """What was written last into some rows of the buffers."""
        for row in rows:
            stacks = [stack[row] for stack in self.buffers.values()]
            torch._foreach_copy_(stacks, list(self._one.buffers.values()))
        finish(self.buffers)


@final
class ReplacedBank(CopiedForm, PlacedBank):
    """Stacks of whole weights, the base's own first: an adapter is written and copied into its place at strength 1; the
    engine scales the change.

    Args:
        slot, pristine, device, placements: as of `ReplacedForm`.
        places: for adapters.
    """

    def __init__(
        self,
        slot: Slot,
        pristine: Mapping[str, Tensor],
        device: Device,
        places: int,
        placements: Mapping[str, Rows] | None = None,
    ) -> None:
        super().__init__(places)
        self._one = ReplacedForm(slot, pristine, device, placements)
        self.buffers = dict(zip(self._one.buffers, self.stacks(places + 1), strict=True))

    def put(self, place: int, prepared: Prepared) -> None:
        self._one.write([(prepared, 1.0)])
        self.copy([place])


@final
class WrittenBank(PlacedBank):
    """A bank of a factored model with stacks of what adapters change, the first of zeros, in the place of cores. A change at
    strength 1 is computed in float32 and rounded once; the graph scales it.

    Args:
        slot, pristine, device: as of `ReplacedForm`, of linear layers.
        places: for adapters.
        graph: the model's, as `trexport.graph.passes.written_bank` makes it.
    """

    def __init__(self, slot: Slot, pristine: Mapping[str, Tensor], device: Device, places: int, graph: bytes) -> None:
        super().__init__(places)
        self.graph = graph
        self._slot = slot
        self._pristine = {path: weight.to(device) for path, weight in pristine.items()}
        self._device = torch.device(device)
        self._report: SwapReport | None = None
        self.buffers = {
            change_name(path): weight.new_zeros(places + 1, *weight.shape[::-1])
            for path, weight in self._pristine.items()
        }

    @property
    def report(self) -> SwapReport | None:
        return self._report

    def slots(self) -> Sequence[Slot]:
        return [self._slot]

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        layers = {path: layer for path, layer in adapter.layers.items() if path in self._pristine}
        return replace(super().prepare(name, adapter), on_device=PreparedAdapter(layers, self._device))

    def put(self, place: int, prepared: Prepared) -> None:
        adapter = _on_device(prepared)
        places = {path: self.buffers[change_name(path)][place] for path in self._pristine}
        with torch.no_grad():
            for path, into in places.items():
                pairs = [(adapter.on_device(path), 1.0)] if path in adapter.layers else []
                change = weight_change(self._pristine[path], pairs, torch.float32)
                if change is None:
                    into.zero_()
                else:
                    into.copy_(change.T)
            # a sum is finite where all its terms are; looking at it waits for what was written
            sums = torch.stack([into.sum(dtype=torch.float32) for into in places.values()])
        if not bool(sums.isfinite().all()):
            wrong = next(path for path, total in zip(places, sums, strict=True) if not total.isfinite())
            raise ArtifactError(
                f"{wrong}.weight: what {prepared.name!r} changes at strength 1, which a bank holds, is not finite in this "
                "precision"
            )
        reason = "what a bank's place holds"
        changed = dict.fromkeys((path for path in places if path in adapter.layers), reason)
        self._report = SwapReport(0, 0, changed, len(places) - len(changed))


def finish(buffers: Mapping[str, Tensor]) -> None:
    """Wait until what was written is there."""
    if any(tensor.is_cuda for tensor in buffers.values()):
        torch.cuda.synchronize()  # a runtime reads the buffers on a stream of its own


def _on_device(prepared: Prepared) -> PreparedAdapter:
    assert prepared.on_device is not None  # by `ReplacedForm.prepare`
    return prepared.on_device


def pristine_of_engine(artifact: Artifact, slot: Slot) -> dict[str, Tensor]:
    """The weights before any adapter that lie beside an engine, by layer path: of the slot's layers and of those that lie in
    one constant with them.

    Raises:
        ArtifactError: they are not there, or not those of these layers.
    """
    file = artifact.model_folder / ADAPTED_NAME
    try:
        stored = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: the weights before any adapter cannot be read ({error})") from error
    places = artifact.engine_record.placements
    touched = {places[path].constant for path in slot.layers if path in places}
    wanted = [*slot.layers, *(path for path, rows in places.items() if rows.constant in touched)]
    missing = [path for path in wanted if f"{path}.weight" not in stored]
    if missing:
        raise ArtifactError(f"{file}: {missing[0]}.weight is not in it; build the engine again")
    return {path: stored[f"{path}.weight"] for path in wanted}
