"""An artifact on disk: opened, and checked against its manifest and against what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from trexport.backends import EngineRecord
from trexport.errors import ArtifactError, TrexportError
from trexport.hashing import sha256_of_file
from trexport.manifest import MODEL_NAME, Manifest
from trexport.models.adapters import BoundAdapter, open_adapters
from trexport.models.base import Base, open_base
from trexport.models.pipeline import Pipeline, open_pipeline, text_encoders_of
from trexport.progress import SILENT, Progress

ADAPTED_NAME = "adapted.safetensors"
"""Beside a swappable engine: the weights of its adapted layers before any adapter."""


@final
@dataclass(frozen=True)
class Artifact:
    """A folder that trexport wrote."""

    folder: Path
    manifest: Manifest

    @property
    def onnx_path(self) -> Path:
        """The ONNX model inside.

        Raises:
            ArtifactError: this artifact is no ONNX model.
        """
        beside = self.manifest.components  # of a pipeline, what denoises is meant
        models = [n for n in self.manifest.files if Path(n).name == MODEL_NAME and Path(n).parent.name not in beside]
        if len(models) != 1:
            raise ArtifactError(f"{self.folder}: a {self.manifest.kind!r} artifact, expected one with an ONNX model")
        return self.folder / models[0]

    @property
    def engine_record(self) -> EngineRecord:
        """How the engine inside was built.

        Raises:
            ArtifactError: this artifact is no engine, or its record is damaged.
        """
        fields = self.manifest.engine
        if fields is None:
            raise ArtifactError(f"{self.folder}: a {self.manifest.kind!r} artifact, expected one of trexport engine")
        try:
            return EngineRecord.from_dict(fields)
        except (KeyError, TypeError, IndexError) as error:
            raise ArtifactError(
                f"{self.folder}: damaged record of the engine ({type(error).__name__}: {error}); build it again"
            ) from error

    @property
    def model_folder(self) -> Path:
        """Where the model lies, and what belongs to it."""
        if self.manifest.kind == "engine":
            return (self.folder / self.engine_record.file).parent
        return self.onnx_path.parent

    @property
    def blank(self) -> bool:
        """Whether it was made for adapters of some shape, but from none in particular."""
        record = self.manifest.factored or self.manifest.swappable
        return record is not None and bool(record["blank"])

    def sources(
        self, base: str | None = None, adapters: Sequence[str] = (), *, progress: Progress = SILENT
    ) -> tuple[Base, list[BoundAdapter]]:
        """The base and the adapters it was made from, proved to be the same by their hashes.

        Args:
            base: where the base is now; None for where it was.
            adapters: likewise; none for where they were. For a blank or swappable artifact, any that are to be
                fed.

        Raises:
            ArtifactError: they have changed since, or are not found.
        """
        manifest = self.manifest
        if (self.blank or manifest.swappable is not None) and adapters:
            # it holds no adapter: these are to be fed
            opened = open_base(base or manifest.base.name)
            self._check_base(opened, progress)
            return opened, open_adapters(adapters, opened)
        if adapters and len(adapters) != len(manifest.adapters):
            raise ArtifactError(f"{len(adapters)} adapters given, the artifact was made from {len(manifest.adapters)}")
        try:
            opened = open_base(base or manifest.base.name)
            names = adapters or [adapter.name for adapter in manifest.adapters]
            arguments = [f"{name}={record.strength!r}" for name, record in zip(names, manifest.adapters, strict=True)]
            bound = open_adapters(arguments, opened, lambda: self._encoders(opened))
        except TrexportError as error:
            raise ArtifactError(
                f"{self.folder}: what it was made from is not found: {error}; say where it is with --base and --adapter"
            ) from error
        self._check_base(opened, progress)
        for adapter, record in zip(bound, manifest.adapters, strict=True):
            if adapter.sha256 != record.sha256:
                raise ArtifactError(
                    f"{adapter.name}: not the adapter that {self.folder} was made from (its hash differs)"
                )
        return opened, bound

    def pipeline(self, base: Base) -> Pipeline:
        """The pipeline that the artifact's other models were made from, proved to be the same by their hashes.

        Args:
            base: as `sources` gives it.

        Raises:
            ArtifactError: components have changed since, or are not found.
        """
        pipeline = open_pipeline(base)
        for name, record in {**self.manifest.components, **self.manifest.text_encoders}.items():
            component = pipeline.components.get(name) if pipeline is not None else None
            if component is None:
                raise ArtifactError(f"{base.name}: no {name}, which {self.folder} holds; say where it is with --base")
            if component.source.content_hash() != record.content_hash:
                raise ArtifactError(
                    f"{component.source.name}: not what {self.folder / name} was made from (its hash differs)"
                )
        assert pipeline is not None
        return pipeline

    def _encoders(self, base: Base) -> dict[str, Base] | None:
        """The text encoders that the adapters are on as well, None where none of this artifact holds any."""
        records = (*self.manifest.components.values(), *self.manifest.text_encoders.values())
        if not any(record.adapters for record in records):
            return None
        return text_encoders_of(base)

    def _check_base(self, base: Base, progress: Progress) -> None:
        if base.content_hash(progress) != self.manifest.base.content_hash:
            raise ArtifactError(f"{base.name}: not the base that {self.folder} was made from (its hash differs)")


def open_artifact(folder: str | Path, *, verify: bool = True, progress: Progress = SILENT) -> Artifact:
    """Open an artifact.

    Args:
        verify: check every file's hash against the manifest.

    Raises:
        ArtifactError: no manifest, a file missing, or a file that changed since it was written.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder")
    artifact = Artifact(path, Manifest.read(path))
    missing = [name for name in artifact.manifest.files if not (path / name).is_file()]
    if missing:
        raise ArtifactError(f"{path}: {missing[0]} is missing, the manifest lists it")
    if verify:
        with progress.task("verify", sum((path / name).stat().st_size for name in artifact.manifest.files)) as task:
            for name, digest in artifact.manifest.files.items():
                if sha256_of_file(path / name) != digest:
                    raise ArtifactError(
                        f"{path / name}: changed or damaged, its hash is not the manifest's; export again"
                    )
                task.advance((path / name).stat().st_size)
        if artifact.manifest.weights_hash is not None and open_base(str(path)).content_hash(progress) != (
            artifact.manifest.weights_hash
        ):
            raise ArtifactError(f"{path}: the weights changed, their hash is not the manifest's; merge again")
        for name, record in artifact.manifest.text_encoders.items():
            pipeline = open_pipeline(open_base(str(path)))
            source = None if pipeline is None else pipeline.text_encoders.get(name)
            if source is None or source.content_hash() != record.weights_hash:
                raise ArtifactError(
                    f"{path / name}: the weights changed, their hash is not the manifest's; merge again"
                )
    return artifact
