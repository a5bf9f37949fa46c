"""Adapter checkpoints, format version 1: safetensors and JSON, nothing ever unpickled.

A folder with `adapter_model.safetensors` and `adapter_config.json`, or one `.safetensors` file whose header metadata key
`trlora` holds the same JSON. Keys are `<module>.transform.<tensor>`, `<module>.residual.<tensor>`,
`<module>.magnitude.<tensor>` and `<module>.output_transform.<tensor>`; `<module>.bias.offset` and
`<module>.weight.offset` are what is added to biases and to the weights of normalisations. What is for another model of the
same pipeline has its name before it: `text_encoder/<module>.residual.<tensor>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trlora.adapter import COMPONENT, OFFSET, Adapter
from trlora.config import FORMAT, AdapterConfig
from trlora.errors import CheckpointError, TrloraError, nearest
from trlora.files import atomic_file, atomic_folder
from trlora.parts import LayerParts
from trlora.spec import PARTS

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_OFFSETS = (f".bias{OFFSET}", f".weight{OFFSET}")


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
        check_tensor(key, tensor)
    config = replace(adapter.config, components={name: part.config for name, part in adapter.components.items()})
    if target.suffix == ".safetensors":
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists; choose another name, or pass overwrite=True")
        with atomic_file(target) as temporary:
            own = {FORMAT: json.dumps(config.to_dict())}
            safetensors.torch.save_file(tensors, temporary, metadata={**adapter.metadata, **own})
        return
    with atomic_folder(target, overwrite=overwrite) as folder:
        safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata=dict(adapter.metadata) or None)
        (folder / CONFIG_NAME).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


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
    tensors, metadata = read_safetensors(weights)
    try:
        config = AdapterConfig.from_dict(_read_config(source, metadata))
        by_model: dict[str, dict[str, Tensor]] = {"": {}}
        for key, tensor in tensors.items():
            check_tensor(key, tensor)
            component, _, rest = key.rpartition(COMPONENT)
            by_model.setdefault(component, {})[rest] = tensor
        for name in {*by_model, *config.components} - {""}:
            if name not in config.components or name not in by_model:
                lacking = "config" if name in by_model else "file"
                raise CheckpointError(f"{name}{COMPONENT}: this model of the pipeline is missing in the {lacking}")
        components = {
            name: _adapter(by_model[name], part, f"{path}: {name}", {}) for name, part in config.components.items()
        }
        adapter = _adapter(by_model[""], config, str(path), provenance(metadata), alone=not components)
    except TrloraError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return replace(adapter, components=components)


def _adapter(
    tensors: dict[str, Tensor], config: AdapterConfig, source: str, metadata: Mapping[str, str], *, alone: bool = True
) -> Adapter:
    """What is for one model.

    Args:
        alone: whether there has to be something for it.
    """
    offsets = {key.removesuffix(OFFSET): tensors.pop(key) for key in list(tensors) if key.endswith(_OFFSETS)}
    for name, tensor in offsets.items():
        if tensor.ndim != 1:
            raise CheckpointError(f"{name}{OFFSET}: shape {tuple(tensor.shape)} found, expected one dimension")
    layers = _layers_from_tensors(tensors, config, empty=bool(offsets) or not alone)
    return Adapter(replace(config, components={}), layers, source, metadata=metadata, offsets=offsets)


def provenance(metadata: Mapping[str, str]) -> dict[str, str]:
    """Of a header's metadata what says where an adapter comes from: kohya's `ss_…` and ModelSpec's `modelspec.…`."""
    return {key: value for key, value in metadata.items() if key.startswith(("ss_", "modelspec."))}


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


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header metadata of a file.

    Raises:
        CheckpointError: it is no safetensors file, truncated, or corrupt.
    """
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


def _layers_from_tensors(tensors: Mapping[str, Tensor], config: AdapterConfig, *, empty: bool) -> dict[str, LayerParts]:
    by_layer: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        path, part, name = _split_key(key)
        by_layer.setdefault(path, {part: {} for part in PARTS})[part][name] = tensor
    if not by_layer and not empty:
        raise CheckpointError("no tensors inside, expected at least one layer")
    for path in config.overrides:
        if path not in by_layer:
            raise CheckpointError(f"the config overrides {path!r}, which has no tensors{nearest(path, by_layer)}")
    layers: dict[str, LayerParts] = {}
    for path, parts in by_layer.items():
        spec = config.overrides.get(path, config.default)
        layers[path] = LayerParts.from_tensors(path, spec, parts)
    return layers


def _split_key(key: str) -> tuple[str, str, str]:
    # the last one divides, for a module's own path may hold such a word
    part = max(PARTS, key=lambda part: key.rfind(f".{part}."))
    path, found, name = key.rpartition(f".{part}.")
    if found and path and name:
        return path, part, name
    expected = ", ".join(f"<module>.{part}.<tensor>" for part in PARTS)
    raise CheckpointError(f"{key}: unknown key, expected {expected}")


def check_tensor(key: str, tensor: Tensor) -> None:
    """Raises `CheckpointError` for a tensor that is not of floating-point numbers of 16 bits or more, all finite."""
    if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
        raise CheckpointError(f"{key}: dtype {tensor.dtype}, expected a floating-point one of 16 bits or more")
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{key}: {count} of {tensor.numel()} values are NaN or Inf, expected finite values")
