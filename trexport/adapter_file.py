"""Adapters as inputs of one exported graph: ONNX Runtime's adapter file, or plain tensors for IO binding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors.torch
from torch import Tensor

from trexport.artifact import Artifact
from trexport.backends.onnxruntime import read_adapter_file, write_adapter_file
from trexport.errors import ArtifactError, UsageError
from trexport.graph.check import load_graph
from trexport.graph.factored import Factored, tensors_of
from trexport.models.adapters import open_adapters
from trlora.files import atomic_file

SUFFIXES = (".onnx_adapter", ".safetensors")


@final
@dataclass(frozen=True)
class _Shapes:
    """The layers of an exported graph, in a base's stead."""

    name: str
    shapes: dict[str, tuple[int, int]]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return self.shapes


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
        raise ArtifactError(
            f"{artifact.folder}: damaged record of slots ({type(error).__name__}: {error}); export again"
        ) from error


def fingerprint(artifact: Artifact) -> int:
    """31 bits of the base's hash and the slots' shapes: what an adapter file of ONNX Runtime carries as its model version,
    so that one for another artifact is told by it."""
    content = json.dumps([artifact.manifest.base.content_hash, [s.to_dict() for s in factored_of(artifact).slots]])
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "little") >> 1


def adapter_tensors(artifact: Artifact, adapters: Sequence[str]) -> dict[str, Tensor]:
    """Every input that adapters need in an artifact's graph, by name: cores and strengths, float32.

    Args:
        adapters: `ADAPTER[=STRENGTH]`, the k-th for the k-th slot. Slots that are left get strength zero.

    Raises:
        ArtifactError: the artifact is not factored, or an adapter does not fit it.
        CheckpointError: an adapter is refused.
    """
    factored = factored_of(artifact)
    names = {f"{path}.weight": path for path in factored.plan}
    shapes = {
        names[initializer.name]: (int(initializer.dims[0]), int(initializer.dims[1]))
        for initializer in load_graph(artifact.onnx_path).graph.initializer
        if initializer.name in names
    }
    return tensors_of(factored.slots, open_adapters(adapters, _Shapes(str(artifact.folder), shapes)))


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
    wanted = {name: t.shape for slot in factored_of(artifact).slots for name, t in slot.neutral().items()}
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
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ArtifactError(f"{path}: {name}: {found} found, expected shape {tuple(shape)}")
        if not tensors[name].isfinite().all():
            raise ArtifactError(f"{path}: {name}: holds NaN or Inf")
    return tensors
