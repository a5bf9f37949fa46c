"""Adapters as inputs of one exported graph: ONNX Runtime's adapter file, or plain tensors for IO binding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors.torch
import torch
from torch import Tensor

from trexport.artifact import Artifact
from trexport.backends.onnxruntime import read_adapter_file, write_adapter_file
from trexport.errors import ArtifactError, UsageError
from trexport.graph.check import load_graph
from trexport.graph.factored import Factored, tensors_of
from trexport.graph.ops.slots import STRENGTH, Slot, banked, stacked
from trexport.graph.swappable import Swappable
from trexport.models.adapters import BoundAdapter, open_adapters
from trlora.files import atomic_file

SUFFIXES = (".onnx_adapter", ".safetensors")


@final
@dataclass(frozen=True)
class _Shapes:
    """The layers of an exported graph, in a base's stead."""

    name: str
    shapes: dict[str, tuple[int, ...]]

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes

    def addable(self) -> None:
        return None


def factored_of(artifact: Artifact) -> Factored:
    """The slots and the plan of a factored artifact.

    Raises:
        ArtifactError: another form, or a damaged record.
    """
    fields = artifact.manifest.factored
    if fields is None:
        form = artifact.manifest.form
        raise ArtifactError(f"{artifact.folder}: a {form} artifact, expected one of trexport onnx --factored")
    try:
        return Factored.from_dict(fields)
    except (KeyError, TypeError) as error:
        raise _damaged(artifact, error) from error


def swappable_of(artifact: Artifact) -> Swappable:
    """The slot of a swappable artifact.

    Raises:
        ArtifactError: another form, or a damaged record.
    """
    fields = artifact.manifest.swappable
    if fields is None:
        form = artifact.manifest.form
        raise ArtifactError(f"{artifact.folder}: a {form} artifact, expected one of trexport onnx --swappable")
    try:
        return Swappable.from_dict(fields)
    except (KeyError, TypeError) as error:
        raise _damaged(artifact, error) from error


def slots_of(artifact: Artifact) -> list[Slot]:
    """The places for adapters of a factored or swappable artifact; of a bank, that of every place.

    Raises:
        ArtifactError: another form, or a damaged record.
    """
    if artifact.manifest.swappable is not None:
        return [swappable_of(artifact).slot]
    if artifact.manifest.factored is None:
        form = artifact.manifest.form
        raise ArtifactError(
            f"{artifact.folder}: a {form} artifact takes no adapters, expected one of trexport onnx --factored or "
            "--swappable"
        )
    return list(factored_of(artifact).slots)


def _damaged(artifact: Artifact, error: Exception) -> ArtifactError:
    return ArtifactError(f"{artifact.folder}: damaged record of slots ({type(error).__name__}: {error}); export again")


def fingerprint(artifact: Artifact) -> int:
    """31 bits of the base's hash and the slots' shapes: what an adapter file of ONNX Runtime carries as its model version,
    so that one for another artifact is told by it."""
    content = [artifact.manifest.base.content_hash, [slot.to_dict() for slot in slots_of(artifact)]]
    if artifact.manifest.factored is None or factored_of(artifact).bank is not None:
        content.append([artifact.manifest.form, (artifact.manifest.factored or {}).get("bank")])  # stacked tensors
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:4], "little") >> 1


def open_for(artifact: Artifact, adapters: Sequence[str]) -> list[BoundAdapter]:
    """Open `ADAPTER[=STRENGTH]` arguments for the layers of an artifact's graph; the base itself is not needed.

    Raises:
        ArtifactError: an adapter says that it was trained on another base than the artifact was made from.
        CheckpointError: an adapter is refused.
    """
    shapes = layer_shapes(artifact)
    missing = [path for slot in slots_of(artifact) for path in slot.layers if path not in shapes]
    if missing:
        raise ArtifactError(f"{artifact.folder}: {missing[0]}.weight is not in the model; export again")
    bound = open_adapters(adapters, _Shapes(str(artifact.folder), shapes))
    for adapter in bound:
        recorded = adapter.adapter.config.base_model.sha256
        # what trexport records and `inspect` prints; a hash of a file says nothing of what the weights are
        if recorded is not None and recorded.startswith("blake3:") and recorded != artifact.manifest.base.content_hash:
            raise ArtifactError(
                f"{adapter.name}: for another base, {adapter.adapter.config.base_model.name_or_path} with content hash "
                f"{recorded}; {artifact.folder} was made from {artifact.manifest.base.name}, "
                f"{artifact.manifest.base.content_hash}"
            )
    return bound


def layer_shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """The weights of linear layers and convolutions in an artifact's graph, module path → shape; of an engine, those that
    adapters may be on."""
    if artifact.manifest.kind == "engine":
        return dict(artifact.engine_record.layers)
    return {
        initializer.name.removesuffix(".weight"): tuple(initializer.dims)
        for initializer in load_graph(artifact.onnx_path).graph.initializer
        if initializer.name.endswith(".weight") and len(initializer.dims) in (2, 4)
    }


def adapter_tensors(artifact: Artifact, adapters: Sequence[str]) -> dict[str, Tensor]:
    """Every input that adapters need in an artifact's graph, by name, float32: cores and strengths of a factored one, stacks
    of a bank, and of a swappable one what its `merge.onnx` takes.

    Args:
        adapters: `ADAPTER[=STRENGTH]`, the k-th for the k-th slot or place. Slots that are left get strength zero.

    Raises:
        ArtifactError: the artifact takes no adapters, or an adapter does not fit it.
        CheckpointError: an adapter is refused.
    """
    bound = open_for(artifact, adapters)
    if artifact.manifest.swappable is not None:
        (slot,) = slots_of(artifact)
        tensors = [slot.tensors(adapter.layers, adapter.strength, adapter.name) for adapter in bound]
        strengths = torch.cat([found[slot.strength] for found in tensors])
        return stacked(slot, tensors, len(tensors)) | {STRENGTH: strengths}
    return tensors_of(factored_of(artifact), bound)


def write_adapters(
    artifact: Artifact, adapters: Sequence[str], out: Path, *, overwrite: bool = False, dry_run: bool = False
) -> dict[str, Tensor]:
    """Write `adapter_tensors` as a file: `.onnx_adapter` for `RunOptions.add_active_adapter`, `.safetensors` for IO binding.

    Raises:
        UsageError: no adapter, or another suffix.
        FileExistsError: `out` exists and `overwrite` is not set.
        MissingError: ONNX Runtime is not installed, for `.onnx_adapter`.
    """
    if not adapters:
        raise UsageError("no adapter given")
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if out.suffix == ".onnx_adapter" and artifact.manifest.swappable is not None:
        raise UsageError(
            f"{out}: ONNX Runtime's adapter files override initialisers, and merge.onnx of a swappable artifact has none to "
            "override; write .safetensors, or load the adapter itself into a trexport.session.Session"
        )
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another name, or pass --overwrite")
    tensors = adapter_tensors(artifact, adapters)
    if dry_run:
        return tensors
    version = fingerprint(artifact)
    with atomic_file(out) as temporary:
        if out.suffix == ".onnx_adapter":
            write_adapter_file(temporary, tensors, version)
        else:
            safetensors.torch.save_file(tensors, temporary, metadata={"trexport_model_version": str(version)})
    return tensors


def read_adapters(artifact: Artifact, path: Path) -> dict[str, Tensor]:
    """A file of `write_adapters`, checked: written for this artifact, every input there, in its shape, finite.

    Raises:
        ArtifactError: it is not.
    """
    wanted = {name: t.shape for name, t in _neutral(artifact).items()}
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as reader:
                version = (reader.metadata() or {}).get("trexport_model_version")
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, FileNotFoundError) as error:
            raise ArtifactError(f"{path}: no adapter file ({error})") from error
        matches = version == str(fingerprint(artifact))
    else:
        tensors, number = read_adapter_file(path)
        matches = number == fingerprint(artifact)
    if not matches:
        raise ArtifactError(
            f"{path}: written for another artifact; write it with trexport adapter --for {artifact.folder}"
        )
    if artifact.manifest.swappable is not None:  # any number of adapters
        count = len(tensors.get(STRENGTH, ()))
        wanted = {name: torch.Size([count, *shape[1:]]) for name, shape in wanted.items()}
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ArtifactError(f"{path}: {name}: {found} found, expected shape {tuple(shape)}")
        if not tensors[name].isfinite().all():
            raise ArtifactError(f"{path}: {name}: holds NaN or Inf")
    return tensors


def _neutral(artifact: Artifact) -> dict[str, Tensor]:
    """Tensors of every input that an adapter file holds."""
    if artifact.manifest.swappable is not None:
        (slot,) = slots_of(artifact)
        return stacked(slot, [], 1) | {STRENGTH: torch.ones(1)}
    factored = factored_of(artifact)
    if factored.bank is not None:
        return banked(factored.slots[0], [], factored.bank)
    return {name: tensor for slot in factored.slots for name, tensor in slot.neutral().items()}
