"""A model repository for NVIDIA Triton Inference Server from an artifact."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from trexport.adapter_file import open_for
from trexport.artifact import Artifact
from trexport.deploy.config import ModelConfig
from trexport.deploy.image_model import base_of, image_config, write_image
from trexport.deploy.names import ADAPTERS, ARTIFACT
from trexport.deploy.options import TritonOptions
from trexport.deploy.serve.folder import AdapterFolder
from trexport.deploy.unet_model import MODEL_PY, unet_config
from trexport.disk import check_disk
from trexport.errors import UsageError
from trexport.manifest import MANIFEST_NAME
from trexport.models.architectures.unet import UNet
from trexport.progress import SILENT, Progress
from trexport.session.forms import form_of
from trlora.files import atomic_folder, check_free

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@final
@dataclass(frozen=True)
class TritonPlan:
    """What would be written."""

    configs: tuple[ModelConfig, ...]
    """The UNet's, and after it the one that denoises."""
    adapters: tuple[str, ...]
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "models": {config.name: config.backend for config in self.configs},
            "max_batch": self.configs[0].max_batch,
            "adapters": list(self.adapters),
            "size_bytes": self.size_bytes,
        }


def plan_triton(artifact: Artifact, out: Path, options: TritonOptions, *, overwrite: bool = False) -> TritonPlan:
    """Check all that can be checked before anything is written.

    Raises:
        UsageError: options that do not go together, or do not fit the artifact.
        ArtifactError, CheckpointError: an adapter does not fit.
        FileExistsError: `out` is not empty and `overwrite` is not set.
    """
    check_free(out, overwrite=overwrite)
    if not _NAME.fullmatch(options.name):
        raise UsageError(f"--name {options.name!r}: expected letters, digits, _, - and .")
    if artifact.manifest.io.model != UNet.class_name:
        raise UsageError(
            f"{artifact.folder}: a {artifact.manifest.io.model}; repositories are laid out for UNets only so far"
        )
    if artifact.manifest.kind == "dense":
        raise UsageError(f"{artifact.folder}: a dense UNet; make it an ONNX model first, with trexport onnx")
    takes_adapters = artifact.manifest.form in ("factored", "swappable")
    names: tuple[str, ...] = ()
    if options.adapters is not None:
        if not takes_adapters:
            raise UsageError(
                f"{artifact.folder}: a {artifact.manifest.form} artifact takes no adapters; leave --adapters out, or "
                "export with --factored or --swappable"
            )
        names = _checked_adapters(artifact, options.adapters)
    base = base_of(artifact) if options.image else None
    unet = unet_config(artifact, options)
    image = (image_config(artifact, options, unet, base),) if options.image else ()
    files = [artifact.folder / name for name in artifact.manifest.files]
    if options.adapters is not None:
        files += [path for path in options.adapters.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    check_disk(out, size)
    return TritonPlan((unet, *image), names, size)


def write_triton(
    artifact: Artifact,
    out: Path,
    options: TritonOptions,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> TritonPlan:
    """Write a model repository that stands alone: the artifact and the adapters are copied into it.

    Raises:
        What `plan_triton` does.
    """
    plan = plan_triton(artifact, out, options, overwrite=overwrite)
    with atomic_folder(out, overwrite=overwrite) as folder, progress.task("copy"):
        unet = plan.configs[0]
        version = folder / unet.name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(unet.to_pbtxt(), encoding="utf-8")
        if unet.backend == "python":
            _copy(artifact.folder, version / ARTIFACT, [MANIFEST_NAME, *artifact.manifest.files])
            (version / "model.py").write_text(MODEL_PY.format(module="unet"), encoding="utf-8")
            if artifact.manifest.form in ("factored", "swappable"):
                _copy_adapters(options.adapters, version.parent / ADAPTERS, plan.adapters)
        else:
            _copy_native(artifact, version)
        if options.image:
            write_image(artifact, folder, plan.configs[0], plan.configs[1])
    return plan


def _checked_adapters(artifact: Artifact, folder: Path) -> tuple[str, ...]:
    """The names of the adapters in a folder, all of which fit."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder, expected one with adapters in it")
    found = AdapterFolder(folder)
    names = found.names()
    if not names:
        raise UsageError(f"{folder}: no adapters inside, expected NAME/ or NAME.safetensors")
    form = form_of(artifact, "cpu")
    assert form is not None  # the artifact takes adapters
    for name in names:
        (bound,) = open_for(artifact, [str(found.find(name))])
        form.prepare(name, bound)
    return tuple(names)


def _copy_adapters(source: Path | None, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir()
    for name in names:
        assert source is not None  # where else would there be names from
        path = AdapterFolder(source).find(name)
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _copy(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _copy_native(artifact: Artifact, version: Path) -> None:
    """The model's files under the names that Triton's own backends look for."""
    if artifact.manifest.kind == "engine":
        shutil.copyfile(artifact.folder / artifact.engine_record.file, version / "model.plan")
        return
    for path in artifact.onnx_path.parent.iterdir():
        if path.name.startswith("model.onnx"):
            shutil.copyfile(path, version / path.name)
