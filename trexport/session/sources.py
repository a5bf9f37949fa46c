"""What a backend is to load of an artifact, with adapters in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trexport.adapter_file import factored_of
from trexport.artifact import Artifact
from trexport.backends import Device, EngineFile, OnnxFile, TorchModel
from trexport.errors import UsageError
from trexport.graph.factored import tensors_of
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.models.adapters import BoundAdapter
from trexport.models.base import open_base
from trexport.session.form import AbstractBank, AdapterForm
from trexport.session.forms import form_of, is_written
from trexport.session.merge_file import merged_by_file


def fed_tensors(artifact: Artifact, adapters: Sequence[BoundAdapter], device: Device) -> dict[str, Tensor]:
    """What to bind beside the UNet's inputs so that an artifact draws with adapters: cores and strengths of a factored one,
    stacks of a bank (not its index), weights of a swappable one, by its own `merge.onnx`. None for a merged one.

    Raises:
        ArtifactError: an adapter does not fit, or the artifact takes none.
        UsageError: more adapters than it takes at once.
    """
    manifest = artifact.manifest
    whole = manifest.kind == "engine" and artifact.engine_record.bank is not None
    if manifest.factored is not None and not whole:
        return {name: tensor.to(device) for name, tensor in tensors_of(factored_of(artifact), adapters).items()}
    if manifest.swappable is not None and manifest.kind == "onnx":
        return merged_by_file(artifact, adapters, device)
    form = form_of(artifact, device)
    if form is None:
        return {}
    _fill(form, adapters)
    return form.buffers


def _fill(form: AdapterForm, adapters: Sequence[BoundAdapter], chosen: Sequence[int | None] | None = None) -> None:
    prepared = [(form.prepare(adapter.name, adapter), adapter.strength) for adapter in adapters]
    if not isinstance(form, AbstractBank):
        form.write(prepared)
        return
    if len(adapters) > form.places:
        raise UsageError(f"{len(adapters)} adapters given, this bank holds {form.places}")
    form.fill(prepared, _turns(adapters, chosen))


def _turns(adapters: Sequence[BoundAdapter], chosen: Sequence[int | None] | None) -> Sequence[int | None]:
    return chosen if chosen is not None else [0 if adapters else None]


def source_with(
    artifact: Artifact, constants: Mapping[str, Tensor], graph: bytes | None = None
) -> OnnxFile | EngineFile | TorchModel:
    """An artifact as its backend takes it.

    Args:
        constants: what `fed_tensors` gives, or nothing for what the artifact holds itself.
        graph: of a form that has its own.
    """
    manifest = artifact.manifest
    if manifest.kind == "onnx":
        return OnnxFile(artifact.onnx_path, manifest.io, constants, graph)
    if manifest.kind == "engine":
        record = artifact.engine_record
        return EngineFile(artifact.folder / record.file, manifest.io, record, constants)
    return TorchModel(open_base(str(artifact.folder)), (), manifest.dtype)


def source_of(
    artifact: Artifact, adapters: Sequence[BoundAdapter], device: Device
) -> OnnxFile | EngineFile | TorchModel:
    """An artifact with adapters active, as its backend takes it: what a graph holds of itself stays as it is, only what it
    lacks is fed; an engine has no defaults, so that all is fed."""
    manifest = artifact.manifest
    lacks = artifact.blank or manifest.swappable is not None or manifest.kind == "engine"
    return source_with(artifact, fed_tensors(artifact, adapters, device) if lacks else {})


def source_in_session(
    artifact: Artifact,
    adapters: Sequence[BoundAdapter],
    device: Device,
    chosen: Sequence[int | None] | None = None,
) -> OnnxFile | EngineFile | TorchModel:
    """An artifact with adapters active, as a `Session` runs it; a factored one that holds other adapters than these draws
    with its own, as `source_of` has it.

    Args:
        chosen: of a bank, the numbers of adapters, from 0, that samples take in turn, None for the base; the first one for
            all unless given. A bank whose graph is told is to be told so, by `chosen_in_bank`.
    """
    held = [(record.sha256, record.strength) for record in artifact.manifest.adapters]
    other = artifact.manifest.factored is not None and not artifact.blank
    other = other and held != [(adapter.sha256, adapter.strength) for adapter in adapters]
    form = form_of(artifact, device) if is_written(artifact, device) and not other else None
    if form is None:
        return source_of(artifact, adapters, device)
    _fill(form, adapters, chosen)
    return source_with(artifact, form.buffers, form.graph)


def chosen_in_bank(
    artifact: Artifact, adapters: Sequence[BoundAdapter], chosen: Sequence[int | None] | None = None
) -> dict[str, Tensor]:
    """Of a bank the index and strength that draw as `chosen` has it, or with the first adapter in it, one each for a sample
    of those, or for all; nothing for another form."""
    if artifact.manifest.factored is None or factored_of(artifact).bank is None:
        return {}
    turns = _turns(adapters, chosen)
    strengths = [1.0 if number is None else adapters[number].strength for number in turns]
    index = [0 if number is None else number + 1 for number in turns]
    return {ADAPTER_INDEX: torch.tensor(index), ADAPTER_STRENGTH: torch.tensor(strengths)}


def backend_for(artifact: Artifact) -> str:
    """The name of the backend that runs an artifact."""
    if artifact.manifest.kind == "engine":
        return artifact.engine_record.backend
    return "onnxruntime" if artifact.manifest.kind == "onnx" else "torch"
