"""Checkpoints of a training: an adapter checkpoint, format version 1, with what goes on from there beside it.

`checkpoint-000500/` has `adapter_model.safetensors` and `adapter_config.json`, the adapter as it stands (what `load_adapter`
reads), and `training_state.safetensors` and `training_state.json`: the optimiser's moments, the moving average, the loss
scaler, the config. Nothing is ever unpickled. There is no state of a random generator: every step seeds its own.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from torch import Tensor

from trlora.adapter import Adapter
from trlora.checkpoint import load_adapter, read_safetensors, save_adapter
from trlora.errors import CheckpointError, TrloraError
from trlora.files import atomic_folder
from trlora.training.config import TrainingConfig

STATE_NAME = "training_state.safetensors"
CONFIG_NAME = "training_state.json"
_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")


@final
@dataclass(frozen=True)
class TrainingState:
    """Where a training stands after some steps."""

    config: TrainingConfig
    step: int
    """Steps done."""
    adapter: Adapter
    optimizer: dict[int, dict[str, Tensor]]
    """Of each parameter, by its place."""
    averages: tuple[Tensor, ...] = ()
    """Of each parameter, where there is a moving average."""
    scaler: dict[str, float | int] | None = None
    """`torch.amp.GradScaler.state_dict()`, in fp16."""
    samples: int = 0
    """Of the data set."""
    processes: int = 1


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return out / f"checkpoint-{step:06d}"


def checkpoints(out: Path) -> dict[int, Path]:
    """The checkpoints below a folder by their steps, the first one first."""
    found = {int(match[1]): path for path in out.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def save_state(state: TrainingState, folder: Path) -> None:
    """Write a checkpoint; whoever looks sees nothing, or the whole."""
    tensors = {
        f"optimizer.{place}.{name}": tensor.detach().cpu().contiguous()
        for place, entry in state.optimizer.items()
        for name, tensor in entry.items()
    }
    tensors |= {f"average.{place}": tensor.cpu().contiguous() for place, tensor in enumerate(state.averages)}
    fields = {
        "format": "trlora training",
        "format_version": _VERSION,
        "step": state.step,
        "samples": state.samples,
        "processes": state.processes,
        "scaler": state.scaler,
        "config": state.config.to_dict(),
        "versions": {"torch": torch.__version__},
    }
    with atomic_folder(folder, overwrite=True) as temporary:
        save_adapter(state.adapter, temporary, overwrite=True)
        safetensors.torch.save_file(tensors, temporary / STATE_NAME)
        (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load_state(folder: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_NAME} inside, expected the checkpoint of a training")
    try:
        fields = json.loads(file.read_bytes())
        version = fields["format_version"]
        if version != _VERSION:
            raise CheckpointError(
                f"{file}: format_version {version}, expected {_VERSION}; use the trlora that wrote it"
            )
        config = TrainingConfig.from_dict(fields["config"])
        step, samples, processes = (int(fields[name]) for name in ("step", "samples", "processes"))
        scaler = fields["scaler"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, TrloraError):
            raise
        raise CheckpointError(f"{file}: damaged ({type(error).__name__}: {error})") from error
    tensors, _ = read_safetensors(folder / STATE_NAME)
    optimizer: dict[int, dict[str, Tensor]] = {}
    averages: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        kind, place, *name = key.split(".")
        if kind == "optimizer":
            optimizer.setdefault(int(place), {})[name[0]] = tensor
        else:
            averages[int(place)] = tensor
    ordered = tuple(averages[place] for place in sorted(averages))
    return TrainingState(config, step, load_adapter(folder), optimizer, ordered, scaler, samples, processes)


def prune(out: Path, keep: int | None) -> None:
    """Remove all but the last checkpoints."""
    for path in list(checkpoints(out).values())[: -keep if keep else 0]:
        shutil.rmtree(path)


def scaler_state(accelerator: Any) -> dict[str, Any] | None:
    """The loss scaler's state, None where there is none."""
    return None if accelerator.scaler is None else dict(accelerator.scaler.state_dict())
