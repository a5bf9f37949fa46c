"""What the frozen parts of a pipeline make of images and prompts, computed once, kept on disk by content.

An entry's name is a hash of all that it depends on: the model's weights, the image's bytes, the crop. What has changed gets
another name, so that nothing stale is ever read, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from blake3 import blake3
from failures import RecipeError
from torch import Tensor, nn

from trlora.files import atomic_file


class Cache:
    """Small dicts of tensors, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(
        self,
        makers: Mapping[str, Callable[[], dict[str, Tensor]]],
        accelerator: Any,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the entries that are not there; each process does its share, and all wait for the last.

        Raises:
            RecipeError: a value is NaN or Inf, or the disk is full.
        """
        rank, processes = accelerator.process_index, accelerator.num_processes
        for number, (key, make) in enumerate(makers.items()):
            if number % processes == rank and not self._file(key).is_file():
                self._write(key, make())
            told()
        accelerator.wait_for_everyone()

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write(self, key: str, entry: dict[str, Tensor]) -> None:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.items()}
        for name, tensor in kept.items():
            if not torch.isfinite(tensor).all():
                raise RecipeError(f"the pipeline makes NaN or Inf of the data ({name}); its weights look damaged")
        try:
            with atomic_file(self._file(key)) as temporary:
                safetensors.torch.save_file(kept, temporary)
        except OSError as error:
            raise RecipeError(f"{self.folder}: cannot be written ({error.strerror or error}); make room") from error


def key_of(*parts: Any) -> str:
    """A name made of everything that an entry depends on: JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def hash_of_file(path: Path) -> str:
    return blake3(path.read_bytes()).hexdigest()


def hash_of_model(model: nn.Module) -> str:
    """Of its weights as they are, names and dtypes included."""
    hashed = blake3()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()
