"""`trexport engine`: a compiled engine from an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from trexport.adapter_file import factored_of, layer_shapes, slots_of, swappable_of
from trexport.artifact import ADAPTED_NAME, Artifact
from trexport.backends import EngineBackend, EngineOptions, OnnxFile, TorchModel
from trexport.backends.base import BuildReport, EngineRecord
from trexport.disk import check_disk
from trexport.errors import UsageError
from trexport.graph.engine_graph import engine_graph
from trexport.graph.ops.slots import banked
from trexport.hashing import sha256_of_file
from trexport.io_spec import BYTES_OF, Axis, Dtype, ModelSpec, TensorSpec, parts_of
from trexport.manifest import BaseRecord, Manifest, package_versions
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import default_sizes, limits_of
from trexport.models.base import Base, open_base
from trexport.models.model import DTYPES, beside_weights, layers_of
from trexport.models.sample import sample_of
from trexport.pristine import copy_of, stored_weights
from trexport.profile import Profile
from trexport.progress import SILENT, Progress
from trlora.files import atomic_folder, check_free

BUILD_NAME = "build.json"


def usual_sizes(artifact: Artifact, base: Base) -> dict[str, int]:
    """A size for every axis: what the artifact fixes, the model's own for the rest, and a sample's own number of tokens."""
    sizes = default_sizes(base.config)
    sample = sample_of(base)
    if sample is not None:
        sizes["sequence_length"] = sample.prompts.shape[1]
    return sizes | artifact.manifest.io.fixed_sizes()


def build_engine(
    artifact: Artifact,
    base: Base,
    adapters: Sequence[BoundAdapter],
    out: Path,
    backend: EngineBackend,
    options: EngineOptions,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> tuple[Manifest, BuildReport] | None:
    """Build `OUT/unet/<engine>` (or `transformer`, … as the architecture says) with `config.json`, `OUT/build.json`, what
    the builder did, and `OUT/trexport.json`.

    The engine has the artifact's form: merged weights are in it; of a factored artifact or a bank, strengths and cores are
    inputs; of a swappable one, the adapted weights can be replaced, and lie beside it as they are before any adapter. A bank
    of `aotinductor` takes whole weights in the place of cores, and has them beside it likewise.

    Args:
        artifact: of `trexport onnx`, or of `trexport merge` for backends that compile a torch model.
        base, adapters: what the artifact was made from, see `Artifact.sources`.
        dry_run: check everything, build nothing, return None.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is not set.
        UsageError: options that the backend or the artifact does not take.
        MissingError: the builder is not here.
        ExportError: the builder refuses the model.
    """
    manifest = artifact.manifest
    if manifest.kind == "engine":
        raise UsageError(f"{artifact.folder}: an engine already; build from the artifact of trexport onnx")
    options = backend.check(options, "bank" if _bank_of(artifact) is not None else manifest.form)
    if options.refit is not None:
        check_weights_only(base, adapters)
    _check_multiples(options, base)
    check_free(out, overwrite=overwrite)
    source = source_for(artifact, base, adapters, backend)
    check_disk(out, sum(int(torch.Size(shape).numel()) for shape in base.shapes().values()) * BYTES_OF[manifest.dtype])
    if dry_run:
        return None
    takes_adapters = manifest.factored is not None or manifest.swappable is not None
    with atomic_folder(out, overwrite=overwrite) as folder:
        inner = folder / base.architecture.folder
        inner.mkdir()
        record, report = backend.build(source, inner, options, progress=progress)
        config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
        _write_json(inner / "config.json", config, sort_keys=True)
        _write_json(folder / BUILD_NAME, report.to_dict())
        _copy_pipeline(artifact, inner.name, folder)
        if manifest.swappable is not None or record.bank is not None:
            if record.bank is None:
                pristine = pristine_weights(artifact)
            else:
                pristine = _weights_of(base, {f"{path}.weight" for path in _adapted(artifact)}, manifest.dtype)
            pristine |= neighbours(base, record, pristine, manifest.dtype)
            safetensors.torch.save_file(pristine, inner / ADAPTED_NAME)
        layers: dict[str, tuple[int, ...]] = {}
        if takes_adapters:
            layers = _adapted(artifact)
        elif options.refit is not None:  # what a refit has to set back
            shapes = base.weight_shapes()
            layers = {path: shapes[path] for path in layers_of(adapters)}
        fields = record.to_dict() | {"file": f"{inner.name}/{record.file}"}
        fields["layers"] = {path: list(shape) for path, shape in layers.items()}
        with progress.task("hash"):
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in paths}
        built = Manifest(
            kind="engine",
            form=manifest.form,
            dtype=manifest.dtype,
            io=_fixed_by(manifest.io, record.profiles),
            base=BaseRecord(manifest.base.name, manifest.base.content_hash),
            adapters=manifest.adapters,
            files=files,
            opset=manifest.opset,
            opset_reason=manifest.opset_reason,
            target_gpu=", ".join(record.targets),
            factored=manifest.factored,
            swappable=manifest.swappable,
            engine=fields,
            components=manifest.components,
            left_out=manifest.left_out,
            versions=package_versions() | dict(record.runtime),
        )
        built.write(folder)
    return built, report


def check_weights_only(base: Base, adapters: Sequence[BoundAdapter]) -> None:
    """Raises `UsageError` for adapters that change a bias or a normalisation: a refit sets weights."""
    others = beside_weights(base, adapters)
    if others:
        raise UsageError(
            f"{others[0]}: an adapter changes it, as (IA)³ does outside of feed-forward layers, and a refit sets weights "
            "only: build without --refit"
        )


def _check_multiples(options: EngineOptions, base: Base) -> None:
    for axis, limit in limits_of(base.config).items():
        for profile in options.profiles:
            sizes = [sizes[axis] for sizes in (profile.min, profile.opt, profile.max)]
            if any(size % limit.multiple for size in sizes):
                raise UsageError(
                    f"profile {profile}: {axis} must be a multiple of {limit.multiple} for this {base.architecture.noun}"
                )
            if limit.most is not None and max(sizes) > limit.most:
                raise UsageError(f"profile {profile}: {axis} must be {limit.most} at most for this model")


def default_profile(artifact: Artifact, base: Base) -> Profile:
    """The usual sizes, fixed: what a profile is where none is asked for."""
    return Profile.of(usual_sizes(artifact, base))


def pristine_weights(artifact: Artifact) -> dict[str, Tensor]:
    """Of a swappable ONNX artifact the adapted weights before any adapter, by parameter name, in the artifact's dtype."""
    return {name: copy_of(stored) for name, stored in stored_weights(artifact, swappable_of(artifact).slot).items()}


def neighbours(base: Base, record: EngineRecord, adapted: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """The weights that lie in one constant with adapted ones and are not adapted themselves, by parameter name: who replaces
    a part of a constant gives the whole."""
    names = {path: f"{path}.weight" for path in record.placements}
    touched = {rows.constant for path, rows in record.placements.items() if names[path] in adapted}
    wanted = {names[path] for path, rows in record.placements.items() if rows.constant in touched} - adapted.keys()
    return _weights_of(base, wanted, dtype)


def _weights_of(base: Base, names: Collection[str], dtype: Dtype) -> dict[str, Tensor]:
    return {
        entry.name: file.tensor(entry.name).to(DTYPES[dtype])
        for file in base.weights
        for entry in file.entries
        if entry.name in names
    }


def _adapted(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """The layers that take adapters, and the shapes of their weights."""
    shapes = layer_shapes(artifact)
    return {path: shapes[path] for slot in slots_of(artifact) for path in slot.layers}


def _bank_of(artifact: Artifact) -> int | None:
    """How many places an artifact has for adapters of samples; None where it is no bank."""
    return None if artifact.manifest.factored is None else factored_of(artifact).bank


def _fixed_by(io: ModelSpec, profiles: Sequence[Profile]) -> ModelSpec:
    """The inputs and outputs with the axes fixed that every profile has at one and the same size."""
    fixed = {
        axis: size
        for axis, size in profiles[0].fixed.items()
        if all(profile.fixed.get(axis) == size for profile in profiles)
    }

    def fix(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t.name, t.dtype, tuple(_fixed(a, fixed) for a in t.axes)) for t in tensors)

    return replace(io, inputs=fix(io.inputs), outputs=fix(io.outputs), fixed={**io.fixed, **fixed})


def _fixed(axis: Axis, sizes: Mapping[str, int]) -> Axis:
    if isinstance(axis, int):
        return axis
    name, times, over = parts_of(axis)
    return sizes[name] * times // over if name in sizes else axis


def source_for(
    artifact: Artifact, base: Base, adapters: Sequence[BoundAdapter], backend: EngineBackend
) -> TorchModel | OnnxFile:
    """What a backend builds from: a torch model, or a graph as `trexport.graph.engine_graph` makes it.

    Raises:
        UsageError: an artifact that the backend cannot build from.
    """
    manifest = artifact.manifest
    if backend.builds_from is TorchModel:
        if manifest.kind == "dense":
            return TorchModel(open_base(str(artifact.folder)), (), manifest.dtype)
        timestep = next((tensor.axes for tensor in manifest.io.inputs if tensor.name == "timestep"), ())
        bank = _bank_of(artifact)
        replaced = manifest.swappable is not None or bank is not None
        return TorchModel(
            base,
            () if replaced else adapters,
            manifest.dtype,
            timestep_per_sample=bool(timestep),
            bank=bank,
            replaceable=_adapted(artifact) if replaced else {},
        )
    if manifest.kind != "onnx":
        raise UsageError(
            f"{artifact.folder}: a model for torch; {backend.name} builds from an artifact of trexport onnx"
        )
    constants: dict[str, Tensor] = {}
    if manifest.factored is not None:
        factored = factored_of(artifact)
        if factored.bank is not None:
            constants = banked(factored.slots[0], [], factored.bank)
        else:
            constants = {name: tensor for slot in factored.slots for name, tensor in slot.neutral().items()}
    elif manifest.swappable is not None:
        constants = pristine_weights(artifact)
    graph = engine_graph(artifact.onnx_path, constants)
    return OnnxFile(artifact.onnx_path, manifest.io, constants, graph)


def _copy_pipeline(artifact: Artifact, own: str, folder: Path) -> None:
    """What else a whole pipeline needs: its other models, tokenizers, scheduler."""
    for name in artifact.manifest.files:
        if artifact.manifest.kind == "onnx" and Path(name).parts[0] != own:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.folder / name, target)


def _write_json(path: Path, fields: Any, *, sort_keys: bool = False) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
