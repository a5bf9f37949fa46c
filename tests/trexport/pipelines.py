"""What the tests of whole pipelines need."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor

from trexport.models.base import open_base
from trexport.models.pipeline import Pipeline, open_pipeline

STATIC = ["--batch-size", "2", "--height", "8", "--width", "8", "--sequence-length", "5"]
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def opened(folder: Path, *names: str) -> Pipeline:
    """A pipeline with some of its components only; with all where none is named."""
    pipeline = open_pipeline(open_base(str(folder)))
    assert pipeline is not None
    components = {name: value for name, value in pipeline.components.items() if not names or name in names}
    return dataclasses.replace(pipeline, components=components)


def edit_weights(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def fake_hub(hub: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A folder as the Hub's, whatever the id; what is fetched lies in `cache/0123abcd`. The revisions that are asked for."""
    asked: list[str | None] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        for file in hub.rglob("*"):
            inside = file.relative_to(hub).as_posix()
            if file.is_file() and any(fnmatch(inside, pattern) for pattern in allow_patterns):
                (cache / "0123abcd" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / "0123abcd" / inside)
        return str(cache / "0123abcd")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def run_session(path: Path, value: Tensor) -> dict[str, Tensor]:
    """A model of one input in ONNX Runtime, with nothing of ours around it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {session.get_inputs()[0].name: value.numpy()})
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, found, strict=True)}
