"""What a check of a running server compares its answers with: what the server says that it serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trexport.artifact import Artifact
from trexport.deploy.check import served_sources
from trexport.deploy.options import TritonOptions
from trexport.deploy.unet_model import unet_config
from trexport.errors import AdapterWarning
from trexport.manifest import BaseRecord
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trexport.models.pipeline import text_encoders_of
from trlora import CheckpointError

URL = "http://localhost:8000"
UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Encoders = Callable[[], Mapping[str, Base] | None]


def written(file: Path, base: Base, component: str) -> Path:
    """A LoRA on a layer of the UNet and one of a text encoder."""
    width = base.weight_shapes()[UNET.removeprefix("unet.")][1]
    tensors = {f"{UNET}.lora_A.weight": torch.ones(2, width), f"{UNET}.lora_B.weight": torch.ones(width, 2)}
    key = f"{component}.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    safetensors.torch.save_file(tensors, file)
    return file


def served(artifact: Artifact, base: Base, file: Path, encoders: Encoders) -> dict[str, Any]:
    """What the repository of an artifact of that base and adapter tells a client."""
    records = tuple(adapter.record() for adapter in open_adapters([str(file)], base, encoders))
    manifest = replace(artifact.manifest, base=BaseRecord(base.name, base.content_hash()), adapters=records)
    config = unet_config(replace(artifact, manifest=manifest), TritonOptions())
    return json.loads(config.parameters["trexport"])


@pytest.fixture
def sd(pipelines: Path) -> Base:
    return open_base(str(pipelines / "sd"))


def test_text_encoders_are_asked_for_where_the_artifact_has_the_adapter_in_them(
    half_artifact: Artifact, sd: Base, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", sd, "text_encoder")
    record = served(half_artifact, sd, file, lambda: text_encoders_of(sd))
    _, (bound,) = served_sources(URL, record, None)
    assert list(bound.components) == ["text_encoder"]


def test_of_a_unet_alone_they_are_not(half_artifact: Artifact, sd: Base, tmp_path: Path) -> None:
    """`trexport onnx --unet-only` leaves out what is for text encoders, even of ones that this pipeline does not have."""
    file = written(tmp_path / "a.safetensors", sd, "text_encoder_2")
    with pytest.raises(CheckpointError, match="pipeline has text_encoder"):
        open_adapters([str(file)], sd, lambda: text_encoders_of(sd))
    with pytest.warns(AdapterWarning, match="left out"):
        record = served(half_artifact, sd, file, lambda: None)
    with pytest.warns(AdapterWarning, match="left out"):
        _, (bound,) = served_sources(URL, record, None)
    assert (list(bound.layers), bound.components) == ([UNET.removeprefix("unet.")], {})
