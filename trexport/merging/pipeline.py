"""`trexport merge` of a whole pipeline: adapters folded into what denoises and its text encoders, the rest taken over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from trexport.disk import check_disk
from trexport.hashing import sha256_of_file
from trexport.io_spec import Dtype
from trexport.manifest import EncoderRecord
from trexport.merging.model import merged_manifest, plan_merge, write_model
from trexport.merging.parts import Part, parts_of, read_index
from trexport.merging.weights import target_entries, write_json, write_weights
from trexport.models.adapters import BoundAdapter, on_component
from trexport.models.base import Base
from trexport.models.model import layers_of, offsets_of
from trexport.models.pipeline import INDEX_FILE, Pipeline
from trexport.models.weights import SHORT_DTYPES, TORCH_DTYPES
from trexport.progress import SILENT, Progress
from trlora import MergeReport
from trlora.files import atomic_folder


@final
@dataclass(frozen=True)
class PipelinePlan:
    """What a merge of a pipeline is going to do."""

    out: Path
    tensors: int
    adapted: Mapping[str, int]
    """Component → layers that adapters are on."""
    size_bytes: int
    left_out: Mapping[str, str]
    """Name → class of what is not there to be taken over."""


@final
@dataclass(frozen=True)
class PipelineMerge:
    """What a merge of a pipeline did."""

    unet: MergeReport
    text_encoders: Mapping[str, MergeReport]
    """Of those that adapters are on."""
    left_out: Mapping[str, str]


def plan_pipeline_merge(
    base: Base,
    pipeline: Pipeline,
    adapters: Sequence[BoundAdapter],
    out: Path,
    dtype: Dtype | None = None,
    *,
    overwrite: bool = False,
) -> PipelinePlan:
    """What `merge_pipeline` would do, nothing written. Raises what it would raise before it writes."""
    return _planned(base, pipeline, adapters, out, dtype, overwrite=overwrite)[0]


def _planned(
    base: Base,
    pipeline: Pipeline,
    adapters: Sequence[BoundAdapter],
    out: Path,
    dtype: Dtype | None,
    *,
    overwrite: bool,
) -> tuple[PipelinePlan, Mapping[str, Part]]:
    unet = plan_merge(base, adapters, out, dtype, overwrite=overwrite)
    parts, left_out = parts_of(base, pipeline)
    encoders = pipeline.text_encoders
    entries = [
        entry for source in encoders.values() for file in source.weights for entry in target_entries(file, dtype)
    ]
    size = unet.size_bytes + sum(entry.size_bytes for entry in entries)
    size += sum(part.files_bytes if name in encoders else part.size_bytes for name, part in parts.items())
    check_disk(out, size)
    on = {name: on_component(adapters, name) for name in encoders}
    adapted = {name: len({**layers_of(some), **offsets_of(some)}) for name, some in on.items()}
    adapted = {**unet.adapted, **{name: count for name, count in adapted.items() if count}}
    return PipelinePlan(out, unet.tensors + len(entries), adapted, size, left_out), parts


def merge_pipeline(
    base: Base,
    pipeline: Pipeline,
    adapters: Sequence[BoundAdapter],
    out: Path,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> PipelineMerge:
    """Write a pipeline's folder that `DiffusionPipeline.from_pretrained` loads, with the adapters in the weights of its UNet
    or transformer and of its text encoders. See `trexport.merging.model.merge` for how they are computed.

    Args:
        pipeline: the base's, see `open_pipeline`.
        dtype: of the UNet and the text encoders; the VAE is taken over as it is, and so is all that has no adapter where
            this is None.

    Raises:
        FileExistsError, UsageError, TrexportError, OSError: as `merge`.
    """
    plan, parts = _planned(base, pipeline, adapters, out, dtype, overwrite=overwrite)
    reports: dict[str, MergeReport] = {}
    encoders: dict[str, EncoderRecord] = {}
    with atomic_folder(out, overwrite=overwrite) as folder:
        inner = base.architecture.folder
        (folder / inner).mkdir()
        unet = write_model(base, adapters, folder / inner, dtype, progress=progress)
        for name, part in parts.items():
            (folder / name).mkdir()
            source = pipeline.text_encoders.get(name)
            if source is None:
                part.copy(folder / name)
                continue
            part.copy_files(folder / name)
            on_it = on_component(adapters, name)
            written = write_weights(source, on_it, folder / name, dtype, progress=progress)
            if dtype is not None:
                _say_dtype(folder / name / "config.json", dtype)
            if on_it:
                reports[name] = written.report
                records = tuple(replace(adapter.record(), components={}) for adapter in on_it)
                class_name = pipeline.components[name].class_name
                encoders[name] = EncoderRecord(class_name, written.source_hash, written.result_hash, records)
        _write_index(pipeline, folder, plan.left_out)
        weights = {
            f"{name}/{source.plain_name(file.name)}"
            for name, source in {inner: base, **{n: pipeline.text_encoders[n] for n in encoders}}.items()
            for file in source.weights
        }
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = {name: sha256_of_file(path) for name, path in paths.items() if name not in weights}
        manifest = merged_manifest(base, adapters, unet, files)
        replace(manifest, text_encoders=encoders, left_out=plan.left_out).write(folder)
    return PipelineMerge(unet.report, reports, plan.left_out)


def _write_index(pipeline: Pipeline, folder: Path, left_out: Mapping[str, str]) -> None:
    index = {name: [None, None] if name in left_out else value for name, value in read_index(pipeline).items()}
    if "safety_checker" in left_out and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index.pop("_name_or_path", None)
    write_json(folder / INDEX_FILE, index)


def _say_dtype(config: Path, dtype: Dtype) -> None:
    """transformers loads weights in the precision that the config names."""
    fields: dict[str, Any] = json.loads(config.read_bytes())
    name = str(TORCH_DTYPES[SHORT_DTYPES[dtype]]).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in fields:
            fields[key] = name
    write_json(config, fields)
