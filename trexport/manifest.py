"""`trexport.json`, the manifest of an artifact: what it is, from what, made how. No times and no paths of its own, so that
the same inputs give the same bytes."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self, final

from trexport.errors import ArtifactError
from trexport.io_spec import Dtype, ModelSpec

MANIFEST_NAME = "trexport.json"
MANIFEST_VERSION = 1
MODEL_NAME = "model.onnx"
_PACKAGES = ("trexport", "torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors")


@final
@dataclass(frozen=True)
class BaseRecord:
    """The base model that an artifact was made from."""

    name: str
    """As it was given: a folder, a Hub id, `random:…` or `sample:…`."""
    content_hash: str
    """Of the weights' content, however they are spread over files: see `trexport.hashing.hash_of_tensors`."""


@final
@dataclass(frozen=True)
class AdapterRecord:
    """One adapter in an artifact."""

    name: str
    """As it was given."""
    strength: float
    sha256: str
    layers: int
    parameters: int
    offsets: int = 0
    """Biases and weights of normalisations that it changes beside them."""
    components: Mapping[str, int] = field(default_factory=dict)
    """Layers, biases and normalisations that it is merged into in other models of the pipeline, by the component's name."""


@final
@dataclass(frozen=True)
class ComponentRecord:
    """One model of a pipeline beside the one that denoises, in an artifact's folder of its name."""

    class_name: str
    """Of the model that it comes from."""
    dtype: Dtype
    dtype_reason: str | None
    """Why that is not the artifact's."""
    overflow: Mapping[str, Any] | None
    """The first tensor that float16 cannot hold, where that is the reason: `tensor`, `operator`, `max_abs`."""
    opset: int
    io: ModelSpec
    content_hash: str
    """Of the weights it was made from, as `BaseRecord.content_hash`; encoder and decoder of a VAE share them."""
    adapters: tuple[AdapterRecord, ...] = ()
    """That were merged into it."""

    def to_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name not in ("class_name", "io", "adapters")}
        adapters = [vars(adapter) for adapter in self.adapters]
        return {"class": self.class_name} | fields | {"adapters": adapters, "io": self.io.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        rest = {name: value for name, value in fields.items() if name not in ("class", "io", "adapters")}
        adapters = tuple(AdapterRecord(**entry) for entry in fields.get("adapters", ()))
        return cls(class_name=fields["class"], io=ModelSpec.from_dict(fields["io"]), adapters=adapters, **rest)


@final
@dataclass(frozen=True)
class EncoderRecord:
    """A text encoder with adapters in its weights, in a merged pipeline's folder of its name."""

    class_name: str
    content_hash: str
    """Of the weights it was made from, as `BaseRecord.content_hash`."""
    weights_hash: str
    """Of the merged ones."""
    adapters: tuple[AdapterRecord, ...]

    def to_dict(self) -> dict[str, Any]:
        fields = {"class": self.class_name, "content_hash": self.content_hash, "weights_hash": self.weights_hash}
        return fields | {"adapters": [vars(adapter) for adapter in self.adapters]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        adapters = tuple(AdapterRecord(**entry) for entry in fields["adapters"])
        return cls(fields["class"], fields["content_hash"], fields["weights_hash"], adapters)


@final
@dataclass(frozen=True)
class Manifest:
    """See the module."""

    kind: Literal["dense", "onnx", "engine"]
    """A folder of weights for PyTorch, an ONNX model, or a compiled engine."""
    form: Literal["base", "merged", "factored", "swappable"]
    dtype: Dtype
    io: ModelSpec
    base: BaseRecord
    adapters: tuple[AdapterRecord, ...]
    files: Mapping[str, str]
    """File inside the artifact → SHA-256."""
    weights_hash: str | None = None
    """Of a dense model's merged weights, as `BaseRecord.content_hash`."""
    opset: int | None = None
    opset_reason: str | None = None
    target_gpu: str | None = None
    factored: Mapping[str, Any] | None = None
    """Of a factored graph, its slots for adapters and its path plan: see `trexport.graph.factored.Factored`."""
    swappable: Mapping[str, Any] | None = None
    """Of a swappable artifact, the slot of its `merge.onnx`: see `trexport.graph.swappable.Swappable`."""
    engine: Mapping[str, Any] | None = None
    """Of a compiled engine, how it was built: see `trexport.backends.EngineRecord`."""
    components: Mapping[str, ComponentRecord] = field(default_factory=dict)
    """Of a whole pipeline, its other models by the names of their folders."""
    text_encoders: Mapping[str, EncoderRecord] = field(default_factory=dict)
    """Of a merged pipeline, the text encoders that adapters are in."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Of a whole pipeline, name → class of what was not exported."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "trexport",
            "manifest_version": MANIFEST_VERSION,
            "kind": self.kind,
            "form": self.form,
            "dtype": self.dtype,
            "opset": self.opset,
            "opset_reason": self.opset_reason,
            "target_gpu": self.target_gpu,
            "io": self.io.to_dict(),
            "base": vars(self.base),
            "adapters": [vars(adapter) for adapter in self.adapters],
            "weights_hash": self.weights_hash,
            "factored": self.factored,
            "swappable": self.swappable,
            "engine": self.engine,
            "components": {name: record.to_dict() for name, record in self.components.items()},
            "text_encoders": {name: record.to_dict() for name, record in self.text_encoders.items()},
            "left_out": dict(self.left_out),
            "files": dict(sorted(self.files.items())),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(
            kind="dense" if fields["kind"] == "unet" else fields["kind"],  # when there were UNets only
            form=fields["form"],
            dtype=fields["dtype"],
            io=ModelSpec.from_dict(fields["io"]),
            base=BaseRecord(**fields["base"]),
            adapters=tuple(AdapterRecord(**entry) for entry in fields["adapters"]),
            files=fields["files"],
            weights_hash=fields["weights_hash"],
            opset=fields["opset"],
            opset_reason=fields["opset_reason"],
            target_gpu=fields["target_gpu"],
            factored=fields.get("factored"),  # manifests from before these forms lack them
            swappable=fields.get("swappable"),
            engine=fields.get("engine"),
            components={n: ComponentRecord.from_dict(entry) for n, entry in fields.get("components", {}).items()},
            text_encoders={n: EncoderRecord.from_dict(entry) for n, entry in fields.get("text_encoders", {}).items()},
            left_out=fields.get("left_out", {}),
            versions=fields["versions"],
        )

    def write(self, folder: Path) -> None:
        """Write the manifest into an artifact's folder."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of an artifact.

        Raises:
            ArtifactError: there is none, or it is damaged or newer than this trexport.
        """
        file = folder / MANIFEST_NAME
        if not file.is_file():
            raise ArtifactError(f"{folder}: no {MANIFEST_NAME}, expected a folder written by trexport")
        try:
            fields = json.loads(file.read_bytes())
            version_found = fields["manifest_version"]
            if version_found > MANIFEST_VERSION:
                raise ArtifactError(
                    f"{file}: manifest_version {version_found} found, this trexport reads up to {MANIFEST_VERSION}; "
                    "install a newer one"
                )
            return cls.from_dict(fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{file}: damaged manifest ({type(error).__name__}: {error})") from error


def package_versions() -> dict[str, str]:
    """The versions of what an artifact's bytes depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
