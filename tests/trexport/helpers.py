"""What several tests of trexport need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from trexport.cli import main
from trexport.models.base import WEIGHTS_STEM, Base
from trlora import load_adapter

SIZES = {"batch_size": 2, "height": 8, "width": 8, "sequence_length": 5}


def weights_of(base: Base) -> dict[str, Tensor]:
    """Every tensor of a base."""
    return {entry.name: file.tensor(entry.name) for file in base.weights for entry in file.entries}


def write_unet(folder: Path, base: Base, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers UNet folder."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in weights_of(base).items()}
    safetensors.torch.save_file(tensors, folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(base.config)), encoding="utf-8")
    return folder


def merged_in_float64(base: Base, adapters: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
    """The oracle of a merge: `W0·(I + Σ s (T − I)) + Σ s Δ` for every weight, by the formula, in float64."""
    result = {name: tensor.double() for name, tensor in weights_of(base).items()}
    turns: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for path, strength in adapters:
        for layer, parts in load_adapter(path).layers.items():
            name = f"{layer}.weight"
            rows, columns = result[name].shape
            eye = torch.eye(columns, dtype=torch.float64)
            t = eye if parts.transform is None else parts.transform.double().matrix().detach()
            d = torch.zeros(rows, columns, dtype=torch.float64)
            d = d if parts.residual is None else parts.residual.double().delta().detach()
            turns[name] = turns.get(name, eye) + strength * (t - eye)
            changes[name] = changes.get(name, torch.zeros_like(d)) + strength * d
    return result | {name: result[name] @ turns[name] + changes[name] for name in turns}


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folder, target)
    return target


def run_cli(arguments: Sequence[str | Path]) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def leftovers(folder: Path) -> list[str]:
    """What a failed command has left in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())
