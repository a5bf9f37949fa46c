"""What several tests of trexport need."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import numpy_helper
from torch import Tensor

from tests.helpers import trained
from trexport.artifact import Artifact, open_artifact
from trexport.cli import main
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import attach_all_, first_output, load_model
from trlora import Adapter, AdapterSpec, LayerAdapter, LayerParts, load_adapter, save_adapter

SIZES = {"batch_size": 2, "height": 8, "width": 8, "sequence_length": 5}


def weights_of(base: Base) -> dict[str, Tensor]:
    """Every tensor of a base."""
    return {entry.name: file.tensor(entry.name) for file in base.weights for entry in file.entries}


def write_model(folder: Path, base: Base, dtype: torch.dtype = torch.float32) -> Path:
    """A model's folder as its own library saves it."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in weights_of(base).items()}
    safetensors.torch.save_file(tensors, folder / f"{base.architecture.stem}.safetensors", metadata={"format": "pt"})
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


def drawn_by_torch(base: Base, adapters: Sequence[str], feeds: Mapping[str, Tensor]) -> Tensor:
    """One step of the diffusers model with adapters attached, never merged."""
    model = load_model(base)
    attach_all_(model, open_adapters(adapters, base))
    with torch.inference_mode():
        return first_output(model, feeds)


def write_overflowing(base: Base, folder: Path) -> Path:
    """An adapter of finite tensors whose products are not."""
    (bound,) = open_adapters(["random:tlora:2:6"], base)
    with torch.no_grad():
        for parts in bound.adapter.layers.values():
            for part in (parts.transform, parts.residual):
                for parameter in part.parameters() if part is not None else ():
                    parameter *= 1e15
    save_adapter(bound.adapter, folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folder, target)
    return target


def damaged(artifact: Artifact, folder: Path, name: str, change: float, entry: int = 7) -> Artifact:
    """A copy of an artifact with one entry of an initialiser changed."""
    copy_of(artifact.folder, folder)
    path = folder / "unet" / "model.onnx"
    model = onnx.load(path)
    (tensor,) = [i for i in model.graph.initializer if i.name == name]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[entry] += change
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)
    return open_artifact(folder, verify=False)


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    """A model in ONNX Runtime, with nothing of ours around it."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def run_onnx(
    model: Path | onnxruntime.InferenceSession,
    feeds: Mapping[str, Tensor],
    outputs: list[str] | None = None,
    adapter: Path | None = None,
) -> dict[str, Tensor]:
    """One run of an `onnx_session`; of a path, of one for this run alone."""
    session = onnx_session(model) if isinstance(model, Path) else model
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    names = outputs or [output.name for output in session.get_outputs()]
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    found = session.run(names, arrays, options)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, found, strict=True)}


def run_cli(arguments: Sequence[str | Path]) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def leftovers(folder: Path) -> list[str]:
    """What a failed command has left in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def adapter_on(base: Base, specs: Mapping[str, Mapping[str, Any]], path: Path) -> str:
    """Trained layers by their specs, saved as a checkpoint. Returns its folder."""
    layers = {}
    for number, (name, spec) in enumerate(specs.items()):
        rows, *columns = base.weight_shapes()[name]
        layer = LayerAdapter.from_spec(AdapterSpec.from_dict(dict(spec)), math.prod(columns), rows)
        layers[name] = LayerParts.of(trained(layer, number).float())
    save_adapter(Adapter.of(layers), path)
    return str(path)
