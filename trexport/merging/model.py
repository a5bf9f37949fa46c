"""`trexport merge`: adapters folded into a dense UNet, streamed weight by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from trexport.disk import check_disk
from trexport.errors import UsageError
from trexport.hashing import sha256_of_file
from trexport.io_spec import Dtype
from trexport.manifest import BaseRecord, Manifest, package_versions
from trexport.merging.weights import Written, target_entries, write_json, write_weights
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.model import layers_of, offsets_of
from trexport.progress import SILENT, Progress
from trlora import MergeReport
from trlora.files import atomic_folder, check_free


@final
@dataclass(frozen=True)
class MergePlan:
    """What a merge is going to do."""

    out: Path
    tensors: int
    adapted: Mapping[str, int]
    """The model, by its folder's name in a pipeline → layers that adapters are on."""
    size_bytes: int


def plan_merge(
    base: Base, adapters: Sequence[BoundAdapter], out: Path, dtype: Dtype | None = None, *, overwrite: bool = False
) -> MergePlan:
    """What `merge` would do, nothing written. Raises what `merge` would raise before it writes."""
    if not adapters:
        raise UsageError("no adapter given, there is nothing to merge")
    check_free(out, overwrite=overwrite)
    entries = [entry for file in base.weights for entry in target_entries(file, dtype)]
    size_bytes = sum(entry.size_bytes for entry in entries)
    check_disk(out, size_bytes)
    adapted = {base.architecture.folder: len({**layers_of(adapters), **offsets_of(adapters)})}
    return MergePlan(out, len(entries), adapted, size_bytes)


def merge(
    base: Base,
    adapters: Sequence[BoundAdapter],
    out: Path,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> MergeReport:
    """Write a model's folder that its class's `from_pretrained` loads, with the adapters in its weights.

    Every weight is computed in float32 and cast once. File names, shards, the order of the tensors and (unless `dtype`
    is given) their dtypes stay the base's; the same inputs give the same bytes.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is not set.
        UsageError: no adapter given.
        TrexportError: less free disk than the result needs.
        OSError: the disk filled up all the same. Nothing is left then.
    """
    plan_merge(base, adapters, out, dtype, overwrite=overwrite)
    with atomic_folder(out, overwrite=overwrite) as folder:
        written = write_model(base, adapters, folder, dtype, progress=progress)
        files = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.suffix == ".json"}
        merged_manifest(base, adapters, written, files).write(folder)
    return written.report


def write_model(
    base: Base, adapters: Sequence[BoundAdapter], folder: Path, dtype: Dtype | None, *, progress: Progress = SILENT
) -> Written:
    """The weights of `write_weights`, and their config."""
    written = write_weights(base, adapters, folder, dtype, progress=progress)
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    write_json(folder / "config.json", config)
    return written


def merged_manifest(
    base: Base, adapters: Sequence[BoundAdapter], written: Written, files: Mapping[str, str]
) -> Manifest:
    """The manifest of a merged model."""
    return Manifest(
        kind="dense",
        form="merged",
        dtype=written.dtype,
        io=base.architecture.spec(written.dtype),
        base=BaseRecord(base.name, written.source_hash),
        adapters=tuple(adapter.record() for adapter in adapters),
        files=files,
        weights_hash=written.result_hash,
        versions=package_versions(),
    )
