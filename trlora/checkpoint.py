"""Adapter checkpoints, format version 1: safetensors and JSON, nothing ever unpickled.

A folder with `adapter_model.safetensors` and `adapter_config.json`, or one `.safetensors` file whose header metadata key
`trlora` holds the same JSON. Keys are `<module>.transform.<tensor>` and `<module>.residual.<tensor>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from trlora.errors import CheckpointError, SpecError, TrloraError, nearest
from trlora.fields import finite_number
from trlora.files import atomic_file, atomic_folder
from trlora.inject import adapted_modules
from trlora.layers import LayerAdapter
from trlora.residuals import AbstractResidual
from trlora.spec import AdapterSpec
from trlora.transforms import AbstractTransform

FORMAT = "trlora"
FORMAT_VERSION = 1
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


@final
@dataclass(frozen=True)
class BaseModel:
    """What the adapter was trained on, as far as its author said; every field may be None."""

    name_or_path: str | None = None
    class_name: str | None = None
    sha256: str | None = None

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        if not isinstance(fields, Mapping):
            raise SpecError(f"base_model is {fields!r}, expected an object or null")
        values = [fields.get(name) for name in ("name_or_path", "class", "sha256")]
        for name, value in fields.items():
            if name not in ("name_or_path", "class", "sha256"):
                raise SpecError(f"base_model: unknown field {name!r}, expected name_or_path, class, sha256")
            if value is not None and not isinstance(value, str):
                raise SpecError(f"base_model.{name} is {value!r}, expected a string or null")
        return cls(*values)

    def to_dict(self) -> dict[str, str | None]:
        return {"name_or_path": self.name_or_path, "class": self.class_name, "sha256": self.sha256}


@final
@dataclass(frozen=True)
class AdapterConfig:
    """The JSON of a checkpoint."""

    default: AdapterSpec
    overrides: Mapping[str, AdapterSpec] = field(default_factory=dict)
    strength: float = 1.0
    base_model: BaseModel = field(default_factory=BaseModel)

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Raises `SpecError` for anything that format version 1 does not allow."""
        if not isinstance(fields, Mapping) or fields.get("format") != FORMAT:
            found = fields.get("format") if isinstance(fields, Mapping) else type(fields).__name__
            raise SpecError(f'not a trlora adapter: "format" is {found!r}, expected {FORMAT!r}')
        version = fields.get("format_version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise SpecError(f"format_version is {version!r}, expected {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise SpecError(
                f"format_version {version} found, this trlora reads up to {FORMAT_VERSION}; install a newer trexport"
            )
        known = ("format", "format_version", "base_model", "default", "overrides", "strength")
        for name in fields:
            if name not in known:
                raise SpecError(f"unknown field {name!r}{nearest(name, known)}")
        strength = finite_number("adapter", "strength", fields.get("strength", 1.0))
        overrides, base_model = fields.get("overrides", {}), fields.get("base_model")
        if not isinstance(overrides, Mapping) or not isinstance(fields.get("default"), Mapping):
            raise SpecError('"default" and "overrides" must be objects')
        return cls(
            default=AdapterSpec.from_dict(fields["default"]),
            overrides={path: AdapterSpec.from_dict(spec) for path, spec in overrides.items()},
            strength=strength,
            base_model=BaseModel.from_dict({} if base_model is None else base_model),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model.to_dict(),
            "default": self.default.to_dict(),
            "overrides": {path: spec.to_dict() for path, spec in sorted(self.overrides.items())},
            "strength": self.strength,
        }


@final
@dataclass(frozen=True)
class LayerParts:
    """What a checkpoint holds for one layer; a part without tensors is None."""

    spec: AdapterSpec
    transform: AbstractTransform | None
    residual: AbstractResidual | None

    @property
    def in_features(self) -> int:
        if self.transform is not None:
            return self.transform.features
        assert self.residual is not None
        return self.residual.in_features

    @property
    def out_features(self) -> int | None:
        """None where only a transform is stored, which does not know the layer's outputs."""
        return None if self.residual is None else self.residual.out_features


@final
@dataclass(frozen=True)
class Adapter:
    """A checkpoint in memory: its config and, by module path, the members it holds. Valid in itself; `bind` it to a base."""

    config: AdapterConfig
    layers: Mapping[str, LayerParts]
    source: str = "adapter"

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its checkpoint key."""
        result: dict[str, Tensor] = {}
        for path, parts in self.layers.items():
            for part, member in (("transform", parts.transform), ("residual", parts.residual)):
                if member is not None:
                    result |= {f"{path}.{part}.{key}": tensor for key, tensor in member.state_dict().items()}
        return result

    def bind(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, LayerAdapter]:
        """The layer adapters for a base whose linear layers are `shapes`: path → (out_features, in_features).

        Every tensor is bound to a layer or this fails, so that no adapter silently does nothing.

        Raises:
            CheckpointError: a module that the base does not have, or one of another shape.
        """
        problems: list[str] = []
        bound: dict[str, LayerAdapter] = {}
        for path, parts in self.layers.items():
            if path not in shapes:
                problems.append(f"{path}: the base has no such linear layer{nearest(path, shapes)}")
                continue
            rows, columns = shapes[path]
            found = (parts.out_features, parts.in_features)
            if found[0] not in (None, rows) or found[1] != columns:
                outputs = "any" if found[0] is None else found[0]
                problems.append(f"{path}: for {found[1]} → {outputs} features, the base's layer has {columns} → {rows}")
                continue
            bound[path] = LayerAdapter.from_parts(parts.spec, parts.transform, parts.residual, columns, rows)
        if problems:
            more = f" (and {len(problems) - 1} more of {len(self.layers)} layers)" if len(problems) > 1 else ""
            raise CheckpointError(f"{self.source}: does not fit the base: {problems[0]}{more}")
        return bound


def adapter_from_model(
    model: nn.Module, name: str = "default", *, strength: float = 1.0, base_model: BaseModel | None = None
) -> Adapter:
    """The adapter called `name` of a model, as it would be read back from a checkpoint.

    Raises:
        CheckpointError: the model has no adapter of that name, or it has no parameters.
    """
    specs: dict[str, AdapterSpec] = {}
    layers: dict[str, LayerParts] = {}
    for path, layer in adapted_modules(model).items():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            assert isinstance(adapter, LayerAdapter)
            parts = LayerParts(
                adapter.spec,
                None if adapter.transform.trivial else adapter.transform,
                None if adapter.residual.trivial else adapter.residual,
            )
            if parts.transform is not None or parts.residual is not None:
                specs[path] = adapter.spec
                layers[path] = parts
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no adapter {name!r} with parameters; use inject_ first")
    # the commonest description is the default, so that the config says once what holds for most layers
    counts: dict[AdapterSpec, int] = {}
    for spec in specs.values():
        counts[spec] = counts.get(spec, 0) + 1
    default = max(counts, key=lambda spec: counts[spec])
    config = AdapterConfig(
        default=default,
        overrides={path: spec for path, spec in specs.items() if spec != default},
        strength=strength,
        base_model=base_model or BaseModel(class_name=type(model).__name__),
    )
    return Adapter(config, layers)


def save_adapter(adapter: Adapter, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint: one file where `path` ends in `.safetensors`, a folder otherwise. The same adapter gives the
    same bytes; an interrupted call leaves nothing.

    Raises:
        FileExistsError: there is something at `path` and `overwrite` is not set.
        CheckpointError: a tensor holds NaN or Inf.
    """
    target = Path(path)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.tensors().items()}
    for key, tensor in tensors.items():
        _check_finite(key, tensor)
    text = json.dumps(adapter.config.to_dict(), indent=2)
    if target.suffix == ".safetensors":
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists; choose another name, or pass overwrite=True")
        with atomic_file(target) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={FORMAT: json.dumps(adapter.config.to_dict())})
        return
    with atomic_folder(target, overwrite=overwrite) as folder:
        safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_adapter(path: str | Path) -> Adapter:
    """Read a checkpoint (folder or single file) and check all that can be checked without its base.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: no safetensors, a truncated file, an unknown key, a missing core, shapes that make no adapter, a
            value that is not finite, or a config that is wrong, newer, or contradicts the tensors.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    weights = source / WEIGHTS_NAME if source.is_dir() else source
    if not weights.is_file():
        raise CheckpointError(f"{source}: no {WEIGHTS_NAME} inside, expected one beside {CONFIG_NAME}")
    tensors, metadata = _read_safetensors(weights)
    try:
        config = AdapterConfig.from_dict(_read_config(source, metadata))
        layers = _layers_from_tensors(tensors, config)
    except TrloraError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return Adapter(config, layers, str(path))


def _read_config(source: Path, metadata: Mapping[str, str]) -> Any:
    if source.is_dir():
        file = source / CONFIG_NAME
        if not file.is_file():
            raise CheckpointError(f"no {CONFIG_NAME} beside {WEIGHTS_NAME}")
        text, where = file.read_bytes(), CONFIG_NAME
    elif FORMAT in metadata:
        text, where = metadata[FORMAT].encode(), f"header metadata {FORMAT!r}"
    else:
        raise CheckpointError(
            f"no {FORMAT!r} in the header metadata (found {sorted(metadata) or 'none'}); "
            f"a folder with {WEIGHTS_NAME} and {CONFIG_NAME}, or a file saved by save_adapter, is expected"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter from thousands of brackets
        raise CheckpointError(f"{where}: not JSON ({error})") from error


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(file, framework="pt") as reader:
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (no mapping)
            return tensors, reader.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: {why_no_safetensors(file, error)}") from error


def why_no_safetensors(file: Path, error: Exception) -> str:
    """A clear reason for a file that safetensors does not open."""
    with file.open("rb") as stream:
        head = stream.read(2)
    # only asked once the file has failed: a valid header length may begin with the same bytes
    if head == b"PK" or head[:1] == b"\x80":
        return (
            "this is a pickle (a torch.save file), not safetensors, and is not read, for unpickling runs code; "
            "convert it to safetensors where you trust it"
        )
    return f"corrupt or truncated safetensors ({error}); fetch it again"


def _layers_from_tensors(tensors: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, LayerParts]:
    by_layer: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        _check_finite(key, tensor)
        path, part, name = _split_key(key)
        by_layer.setdefault(path, {"transform": {}, "residual": {}})[part][name] = tensor
    if not by_layer:
        raise CheckpointError("no tensors inside, expected at least one layer")
    for path in config.overrides:
        if path not in by_layer:
            raise CheckpointError(f"the config overrides {path!r}, which has no tensors{nearest(path, by_layer)}")
    layers: dict[str, LayerParts] = {}
    for path, parts in by_layer.items():
        spec = config.overrides.get(path, config.default)
        transform = _member(path, "transform", spec.transform, parts["transform"])
        residual = _member(path, "residual", spec.residual, parts["residual"])
        if transform is not None and residual is not None and transform.features != residual.in_features:
            raise CheckpointError(
                f"{path}: the transform has {transform.features} features, the residual takes {residual.in_features}"
            )
        layers[path] = LayerParts(spec, transform, residual)
    return layers


def _member(path: str, part: str, spec: Any, tensors: dict[str, Tensor]) -> Any:
    found = sorted(tensors)
    try:
        member = spec.from_tensors(tensors)
    except TrloraError as error:
        raise CheckpointError(f"{path}.{part}.{error} (a {spec.type!r} {part})") from error
    if tensors:
        left = sorted(tensors)
        known = [key for key in found if key not in left] or ["none"]
        raise CheckpointError(
            f"{path}.{part}.{left[0]}: unknown key for a {spec.type!r} {part}, which takes {', '.join(known)} here"
            f"{nearest(left[0], known)}"
        )
    return member


def _split_key(key: str) -> tuple[str, str, str]:
    # the last one divides, for a module's own path may hold such a word
    part = max("transform", "residual", key=lambda part: key.rfind(f".{part}."))
    path, found, name = key.rpartition(f".{part}.")
    if found and path and name:
        return path, part, name
    raise CheckpointError(f"{key}: unknown key, expected <module>.transform.<tensor> or <module>.residual.<tensor>")


def _check_finite(key: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
        raise CheckpointError(f"{key}: dtype {tensor.dtype}, expected a floating-point one of 16 bits or more")
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{key}: {count} of {tensor.numel()} values are NaN or Inf, expected finite values")
