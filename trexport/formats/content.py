"""What an adapter file or folder holds, before anybody knows its format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from trlora import CheckpointError
from trlora.checkpoint import CONFIG_NAME, WEIGHTS_NAME, check_tensor, read_safetensors

SHOWN = 10
"""Keys that a message lists; all are counted."""
_ONNX_ADAPTER = b"TORT"
"""The identifier of ONNX Runtime's adapter files, after their first four bytes."""


@final
@dataclass(frozen=True)
class Content:
    """The tensors and whatever describes them."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    """Of the safetensors header."""
    config: Mapping[str, Any]
    """Of `adapter_config.json` in the folder, or beside the file; empty where there is none."""

    def check_tensors(self) -> None:
        """Raises `CheckpointError` for one that is not of finite floating-point numbers of 16 bits or more: fp8 has too few
        for a weight to be computed from it."""
        for key, tensor in self.tensors.items():
            check_tensor(key, tensor)


def is_adapter_file(path: Path) -> bool:
    """Whether a file is in ONNX Runtime's adapter format, by its identifier."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(8)[4:] == _ONNX_ADAPTER


def read_content(path: Path) -> Content:
    """Read a folder with `adapter_model.safetensors`, or with a single safetensors file, or such a file, of any name.

    Raises:
        CheckpointError: no safetensors inside, a truncated or corrupt file, a pickle, a config that is no JSON.
    """
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    if path.is_dir() and not weights.is_file():
        alone = sorted(path.glob("*.safetensors"))
        weights = alone[0] if len(alone) == 1 else weights
    if not weights.is_file():
        raise CheckpointError(f"{path}: no {WEIGHTS_NAME} inside, expected one beside {CONFIG_NAME}{_instead(path)}")
    if is_adapter_file(weights):
        raise CheckpointError(
            f"{path}: an adapter file of ONNX Runtime, made for one exported model; `trexport convert` makes an adapter of "
            "it (--to trlora)"
        )
    tensors, metadata = read_safetensors(weights)
    return Content(path, tensors, metadata, _read_config(weights.with_name(CONFIG_NAME), path))


def listed(keys: Iterable[str]) -> str:
    """The first ten of some keys, and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _instead(folder: Path) -> str:
    """Weights of another kind that are there."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not found:
        return ""
    return f"; {found[0]} is a pickle and is not read: convert it to safetensors where you trust it"


def _read_config(file: Path, path: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # the latter from thousands of brackets
        raise CheckpointError(f"{path}: {CONFIG_NAME}: not JSON ({error})") from error
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path}: {CONFIG_NAME}: a {type(config).__name__} found, expected an object")
    return config
