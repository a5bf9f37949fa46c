"""`trexport merge` of a whole pipeline: adapters folded into what denoises and its text encoders, the rest taken over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from trexport.disk import check_disk
from trexport.hashing import sha256_of_file
from trexport.io_spec import Dtype
from trexport.manifest import EncoderRecord
from trexport.merging.model import merged_manifest, plan_merge, write_model
from trexport.merging.weights import write_json, write_weights
from trexport.models.adapters import BoundAdapter, on_component
from trexport.models.base import Base
from trexport.models.model import layers_of
from trexport.models.pipeline import INDEX_FILE, Pipeline
from trexport.models.weights import SHORT_DTYPES, TORCH_DTYPES
from trexport.progress import SILENT, Progress
from trlora import MergeReport
from trlora.files import atomic_folder

_TAKEN = (".json", ".txt", ".safetensors", ".model")
"""Endings of files that a component is made of; pickles are none."""


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
    unet = plan_merge(base, adapters, out, dtype, overwrite=overwrite)
    encoders = pipeline.text_encoders
    copied = [file for name in _parts(base, pipeline)[0] if name not in encoders for file in _files(pipeline, name)]
    size = unet.size_bytes + sum(file.stat().st_size for file in copied)
    size += sum(source.size_bytes for source in encoders.values())
    check_disk(out, size)
    adapted = {name: len(layers_of(on_component(adapters, name))) for name in encoders}
    tensors = unet.tensors + sum(len(source.shapes()) for source in encoders.values())
    adapted = {base.architecture.folder: unet.adapted, **{name: count for name, count in adapted.items() if count}}
    return PipelinePlan(out, tensors, adapted, size, _parts(base, pipeline)[1])


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
    plan = plan_pipeline_merge(base, pipeline, adapters, out, dtype, overwrite=overwrite)
    reports: dict[str, MergeReport] = {}
    encoders: dict[str, EncoderRecord] = {}
    with atomic_folder(out, overwrite=overwrite) as folder:
        inner = base.architecture.folder
        (folder / inner).mkdir()
        unet = write_model(base, adapters, folder / inner, dtype, progress=progress)
        for name in _parts(base, pipeline)[0]:
            source = pipeline.text_encoders.get(name)
            (folder / name).mkdir()
            own = {file.name for file in source.weights} if source is not None else set()
            for file in _files(pipeline, name):
                if source is None or (file.name not in own and not file.name.endswith(".index.json")):
                    plain = base.plain_name(file.name) if file.suffix == ".safetensors" else file.name
                    shutil.copyfile(file, folder / name / plain)
            if source is None:
                continue
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


def _parts(base: Base, pipeline: Pipeline) -> tuple[list[str], dict[str, str]]:
    """The components of a pipeline beside what denoises that are in its folder, and name → class of those that are not."""
    index = json.loads((pipeline.folder / INDEX_FILE).read_bytes())
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    parts.pop(base.architecture.folder, None)
    there = [name for name in parts if _is_there(pipeline.folder / name)]
    return there, {name: kind for name, kind in parts.items() if name not in there}


def _is_there(folder: Path) -> bool:
    """Whether a component can be taken over: one whose weights are pickles cannot."""
    suffixes = {path.suffix for path in folder.glob("*")}
    return bool(suffixes & set(_TAKEN)) and (".safetensors" in suffixes or not suffixes & {".bin", ".pt", ".ckpt"})


def _files(pipeline: Pipeline, name: str) -> list[Path]:
    """The files of a component; of weights in several variants those that were opened."""
    found = [path for path in sorted((pipeline.folder / name).glob("*")) if path.suffix in _TAKEN and path.is_file()]
    sources = [part.source for part in pipeline.components.values()]
    opened = {file.name for source in sources if source.folder == pipeline.folder / name for file in source.weights}
    return [path for path in found if not opened or path.suffix != ".safetensors" or path.name in opened]


def _write_index(pipeline: Pipeline, folder: Path, left_out: Mapping[str, str]) -> None:
    index = json.loads((pipeline.folder / INDEX_FILE).read_bytes())
    index = {name: [None, None] if name in left_out else value for name, value in index.items()}
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
