"""`trexport refit`: other adapters into the weights of a built engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from trexport.artifact import Artifact
from trexport.backends import EngineFile, OnnxFile, engine_backend_of
from trexport.engine import check_weights_only, source_for
from trexport.errors import ArtifactError, UsageError
from trexport.hashing import sha256_of_file
from trexport.io_spec import Dtype
from trexport.manifest import Manifest
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.model import DTYPES, layers_of
from trexport.progress import SILENT, Progress
from trlora import merge_layer
from trlora.files import atomic_folder, check_free


def refit_weights(
    base: Base, old_layers: Iterable[str], adapters: Sequence[BoundAdapter], dtype: Dtype
) -> dict[str, Tensor]:
    """What to write into an engine so that it draws with `adapters` and nothing of what was in it before: the weights of
    every layer that the old or the new adapters are on, each from the pristine base, in float32, rounded once. So A → B → A
    ends with A's bits, and a refit without adapters with the base's.

    Args:
        old_layers: the module paths that the engine's present adapters are on.
        dtype: of the engine's weights, `fp32`, `fp16` or `bf16`.

    Raises:
        UsageError: an adapter changes a bias.

    Returns:
        `<path>.weight` → (out, in), contiguous, on the CPU.
    """
    check_weights_only(base, adapters)
    new = layers_of(adapters)
    pristine = {entry.name: file for file in base.weights for entry in file.entries}
    weights: dict[str, Tensor] = {}
    for path in sorted({*old_layers, *new}):
        name = f"{path}.weight"
        # as an export does it: the weight in the engine's precision, then the adapters on it
        weight = pristine[name].tensor(name).to(DTYPES[dtype])
        merged, _ = merge_layer(path, weight, new.get(path, []))
        weights[name] = merged.to(weight.dtype).contiguous()
    return weights


def refit_engine(
    artifact: Artifact,
    base: Base,
    adapters: Sequence[BoundAdapter],
    out: Path,
    onnx: Artifact | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Manifest | None:
    """Write an engine artifact with other adapters in its weights.

    Args:
        artifact: of `trexport engine --refit`, or `--strip`.
        base: what it was made from.
        onnx: for an engine that was built without its weights, the artifact that it was built from.
        dry_run: check everything, refit nothing, return None.

    Raises:
        UsageError: an engine that was not built for it, or one of a whole pipeline whose text encoders hold other adapters
            than the new ones.
        ArtifactError: a base or an ONNX artifact that the engine was not built from.
        MissingError: no GPU here that the engine is for.
        ExportError: the engine refuses a weight.
    """
    record = artifact.engine_record
    backend = engine_backend_of(record.backend)
    flags = record.settings.get("flags", ())
    if not {"REFIT", "REFIT_IDENTICAL"} & set(flags):
        raise UsageError(f"{artifact.folder}: built without --refit, its weights stay as they are; build it again")
    stripped = bool(record.settings.get("strip"))
    if stripped and onnx is None:
        raise UsageError(f"{artifact.folder}: built without its weights; give what it was built from with --onnx")
    if "REFIT" not in flags and adapters:
        raise UsageError(
            f"{artifact.folder}: built with --strip alone, it takes the weights that it was built with and no others; "
            "build it with --strip --refit"
        )
    if base.content_hash(progress) != artifact.manifest.base.content_hash:
        raise ArtifactError(f"{base.name}: not the base that {artifact.folder} was made from (its hash differs)")
    if onnx is not None and (onnx.manifest.base, onnx.manifest.adapters, onnx.manifest.dtype) != (
        artifact.manifest.base,
        artifact.manifest.adapters,
        artifact.manifest.dtype,
    ):
        raise ArtifactError(f"{onnx.folder}: not the artifact that {artifact.folder} was built from")
    if "REFIT" in flags:
        _check_components(artifact, adapters)
    check_free(out, overwrite=overwrite)
    # an engine that takes the same weights only has its adapters in the ONNX model's
    weights = refit_weights(base, record.layers, adapters, artifact.manifest.dtype) if "REFIT" in flags else {}
    if dry_run:
        return None
    model = source_for(onnx, base, [], backend) if onnx is not None else None
    assert model is None or isinstance(model, OnnxFile)
    source = EngineFile(artifact.folder / record.file, artifact.manifest.io, record)
    with progress.task("refit"):
        data = backend.refit(source, weights, model.path if model else None, model.graph if model else None)
    with atomic_folder(out, overwrite=overwrite) as folder:
        shutil.copytree(artifact.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        (folder / record.file).write_bytes(data)
        shapes = base.weight_shapes()
        layers = {path: shapes[path] for path in layers_of(adapters)} if "REFIT" in flags else record.layers
        now = replace(record, layers=layers, settings={**record.settings, "strip": False})
        adapters_now = tuple(a.record() for a in adapters) if "REFIT" in flags else artifact.manifest.adapters
        manifest = replace(
            artifact.manifest,
            form="merged" if adapters_now else "base",
            adapters=adapters_now,
            engine=now.to_dict(),
            files={**artifact.manifest.files, record.file: sha256_of_file(folder / record.file)},
        )
        manifest.write(folder)
    return manifest


def _check_components(artifact: Artifact, adapters: Sequence[BoundAdapter]) -> None:
    """Raises `UsageError` unless the pipeline's other models, which are taken over as they are, hold the new adapters."""
    for name, record in artifact.manifest.components.items():
        held = {(adapter.sha256, adapter.strength): adapter.name for adapter in record.adapters}
        # also of those that were opened without the pipeline, and so are not bound to it
        parts = [adapter for adapter in adapters if name in adapter.adapter.components]
        asked = {(adapter.sha256, adapter.strength): adapter.name for adapter in parts}
        if held.keys() != asked.keys():
            told = [", ".join(f"{n}={s:g}" for (_, s), n in found.items()) or "no adapter" for found in (held, asked)]
            raise UsageError(
                f"{artifact.folder}: its {name} has {told[0]} merged into it, asked for is {told[1]}, and a refit leaves it "
                "as it is; export and build again, or export with --unet-only and refit that"
            )
