"""Models of every architecture, small."""

from __future__ import annotations

from pathlib import Path

import torch

from trexport.models.base import Base
from trexport.models.model import empty_model
from trlora import Adapter, AdapterConfig, AdapterSpec, LayerAdapter, LayerParts, find_targets, save_adapter

TINY = (
    "tiny",
    "sd21-tiny",
    "tiny-sdxl",
    "sd3-tiny",
    "sd35-tiny",
    "flux-tiny",
    "flux-schnell-tiny",
    "controlnet-tiny",
    "clip-tiny",
    "clip-projection-tiny",
)
"""Of `random:NAME`; a new architecture is one entry."""

_SIZES = {"batch_size": 2, "height": 8, "width": 6, "packed_height_width": 6, "sequence_length": 5}


def sizes_of(base: Base) -> dict[str, int]:
    """A small size for every axis that a base has; height and width are not equal."""
    return {axis: _SIZES[axis] for axis in base.architecture.default_sizes()}


def save_rectangular(folder: Path, base: Base, seed: int, kind: str = "tensor_ring") -> Path:
    """An adapter away from its start on attention and feed-forward layers, of which many are rectangular."""
    transform = {"type": "tensor_ring", "order": 3, "rank": 2} if kind == "tensor_ring" else {"type": "identity"}
    residual = {"type": kind, "rank": 3} | ({"order": 3} if kind == "tensor_ring" else {})
    spec = AdapterSpec.from_dict({"transform": transform, "residual": residual})
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LayerParts] = {}
    for path, layer in find_targets(empty_model(base.architecture), "transformer").items():
        rows, columns = layer.weight.shape
        adapter = LayerAdapter.from_spec(spec, columns, rows, generator)
        for parameter in adapter.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
        layers[path] = LayerParts.of(adapter)
    assert len({parts.in_features == parts.out_features for parts in layers.values()}) == 2
    save_adapter(Adapter(AdapterConfig(default=spec), layers, str(folder)), folder)
    return folder
