"""How adapters get into a graph that is already loaded: one class for each form of an artifact that takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import onnx_ir as ir
from torch import Tensor

from trexport.adapter_file import factored_of, layer_shapes, swappable_of
from trexport.artifact import Artifact
from trexport.backends import Device
from trexport.graph.factored import Factored
from trexport.graph.ops.slots import Slot, banked
from trexport.graph.passes.written import written
from trexport.graph.passes.written_bank import written_bank
from trexport.graph.passes.written_samples import written_samples
from trexport.models.model import DTYPES
from trexport.pristine import stored_weights, view_of
from trexport.session.form import AdapterForm, PlacedBank, Prepared, placed
from trexport.session.replaced import ReplacedBank, ReplacedForm, WrittenBank, WrittenForm, pristine_of_engine
from trexport.session.sample_bank import SampleBank

WRITING: tuple[Device, ...] = ("cuda",)
"""Where writing weights once is faster than computing with cores in every step."""


@final
class FactoredForm(AdapterForm):
    """Cores and strengths are the buffers: activating an adapter copies it."""

    def __init__(self, factored: Factored, device: Device) -> None:
        self._slots = factored.slots
        self.buffers = {}
        for slot in factored.slots:
            self.buffers |= {name: tensor.to(device) for name, tensor in slot.neutral().items()}
        self.write([])

    def slots(self) -> Sequence[Slot]:
        return self._slots

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        taken = placed(active, self._slots)
        for number, slot in enumerate(self._slots):
            # strength zero alone would not silence cores whose products overflow
            tensors = taken[number][0].fits[number] if number in taken else slot.neutral()
            for name, tensor in tensors.items():
                self.buffers[name].copy_(tensor)
            self.buffers[slot.strength].fill_(taken[number][1] if number in taken else 0.0)


@final
class BankForm(PlacedBank):
    """Stacks of cores are the buffers: an adapter is copied into a place once, and each sample says which place it takes."""

    def __init__(self, factored: Factored, device: Device) -> None:
        assert factored.bank is not None
        super().__init__(factored.bank)
        (self._slot,) = factored.slots
        self.buffers = {name: tensor.to(device) for name, tensor in banked(self._slot, [], factored.bank).items()}

    def slots(self) -> Sequence[Slot]:
        return [self._slot]

    def put(self, place: int, prepared: Prepared) -> None:
        for name, tensor in prepared.fits[0].items():
            self.buffers[name][place].copy_(tensor)


def form_of(artifact: Artifact, device: Device) -> AdapterForm | None:
    """How an artifact takes adapters, None for one that takes none."""
    if artifact.manifest.swappable is not None:
        swappable = swappable_of(artifact)
        if artifact.manifest.kind == "engine":
            placements = artifact.engine_record.placements
            return ReplacedForm(swappable.slot, pristine_of_engine(artifact, swappable.slot), device, placements)
        stored = stored_weights(artifact, swappable.slot)
        pristine = {path: view_of(stored[f"{path}.weight"]) for path in swappable.slot.layers}
        return ReplacedForm(swappable.slot, pristine, device)
    if artifact.manifest.factored is None:
        return None
    factored = factored_of(artifact)
    record = artifact.engine_record if artifact.manifest.kind == "engine" else None
    if record is not None and record.bank is not None:
        (slot,) = factored.slots
        return ReplacedBank(slot, pristine_of_engine(artifact, slot), device, record.bank, record.placements)
    if is_written(artifact, device):
        return written_form(artifact, factored, device)
    return FactoredForm(factored, device) if factored.bank is None else BankForm(factored, device)


def is_written(artifact: Artifact, device: Device) -> bool:
    """Whether sessions run an ONNX artifact in another way than the file has it, with weights that `trlora.swap` writes: a
    swappable one, whose file has `merge.onnx`; on a GPU a factored one, whose file computes with cores, where adapters
    change weights and no biases; a bank where that takes no more memory than the model."""
    if artifact.manifest.kind != "onnx":
        return False
    if artifact.manifest.swappable is not None:
        return True
    if artifact.manifest.factored is None or device not in WRITING:
        return False
    factored = factored_of(artifact)
    if any(
        layer.magnitude is not None and layer.magnitude.scales_bias
        for slot in factored.slots
        for layer in slot.layers.values()
    ):
        return False
    return factored.bank is None or _rows_of_bank(artifact, factored) is not None


def written_form(artifact: Artifact, factored: Factored, device: Device) -> WrittenForm | WrittenBank | SampleBank:
    """A factored ONNX artifact with weights in the place of cores; see `is_written`."""
    pristine: dict[str, Tensor] = {}
    for slot in factored.slots:
        stored = stored_weights(artifact, slot)
        pristine |= {path: view_of(stored[f"{path}.weight"]) for path in slot.layers if path not in pristine}
    model = ir.load(artifact.onnx_path)
    cores = [name for slot in factored.slots for name in slot.neutral()]
    if factored.bank is None:
        return WrittenForm(factored.slots, pristine, device, _serialized(written(model, cores)))
    (slot,) = factored.slots
    batch = _rows_of_bank(artifact, factored)
    if batch:
        graph = _serialized(written_samples(model, cores, batch))
        return SampleBank(slot, pristine, device, factored.bank, batch, graph)
    graph = _serialized(written_bank(model, cores, factored.bank))
    return WrittenBank(slot, pristine, device, factored.bank, graph)


def _rows_of_bank(artifact: Artifact, factored: Factored) -> int | None:
    """How a bank is written: with weights for so many samples, where the batch is fixed and they fit; with 0 of them, but a
    change in every place; None where these stacks do not fit into as much memory as the model takes either."""
    (slot,) = factored.slots
    shapes = layer_shapes(artifact)
    elements = sum(math.prod(shapes[path]) for path in slot.layers)
    files = [artifact.folder / name for name in artifact.manifest.files]
    model = sum(file.stat().st_size for file in files if file.parent == artifact.model_folder)
    room = model // (elements * DTYPES[artifact.manifest.dtype].itemsize)
    batch = artifact.manifest.io.fixed_sizes().get("batch_size")
    if batch is not None and batch + 1 <= room:  # and one that is written before it is copied
        return batch
    assert factored.bank is not None
    return 0 if factored.bank + 1 <= room else None


def _serialized(model: ir.Model) -> bytes:
    return ir.serde.serialize_model(model).SerializeToString()
