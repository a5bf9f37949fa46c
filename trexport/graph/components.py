"""The other models of a pipeline as ONNX: text encoders, and the two halves of the VAE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trexport.graph.check import check_model
from trexport.graph.exporter import save_graph
from trexport.graph.opset import OpsetChoice, choose_opset
from trexport.graph.traced import traced_graph
from trexport.io_spec import BYTES_OF, Dtype, ModelSpec
from trexport.manifest import MODEL_NAME, ComponentRecord
from trexport.models.adapters import BoundAdapter, on_component
from trexport.models.component import LoadedComponent, component_feeds, component_spec, load_component, scale_of
from trexport.models.model import DTYPES
from trexport.models.pipeline import INDEX_FILE, Component, Pipeline
from trexport.models.precision import Verdict, fails_in_half
from trexport.progress import SILENT, Progress

_TRACED = {
    "batch_size": 2, "sequence_length": 16, "latent_height": 8, "latent_width": 6, "sample_height": 8, "sample_width": 6,
}  # fmt: skip
_WATCHED_LATENTS = 8
"""Latents a side of the pictures with which a VAE is tried in float16: activations' size hardly depends on it."""


def components_size(pipeline: Pipeline, dtype: Dtype) -> int:
    """About how many bytes the components take; a VAE counts as if it must stay in float32."""
    return sum(
        component.parameters * BYTES_OF[dtype if component.kind == "text_encoder" else "fp32"]
        for component in pipeline.components.values()
    )


def export_components(
    pipeline: Pipeline,
    folder: Path,
    dtype: Dtype,
    opset: int | None = None,
    fixed: Mapping[str, int] | None = None,
    adapters: Sequence[BoundAdapter] = (),
    *,
    progress: Progress = SILENT,
) -> dict[str, ComponentRecord]:
    """Write each component's `model.onnx`, `model.onnx_data` and `config.json` into a folder of its name, the folders that
    are copied, and `model_index.json`.

    In float16 a VAE is tried first: one that overflows, is not close, or whose config has `force_upcast` stays in float32,
    inputs and outputs too, with the reason in its record.

    Args:
        adapters: whose parts for text encoders are merged into them.

    Raises:
        BaseError: a component that cannot be loaded.
        ExportError: the exporter failed, or its result is not a whole model.
    """
    records = {}
    for component in pipeline.components.values():
        with progress.task(component.name):
            on_it = on_component(adapters, component.name)
            loaded = load_component(component, on_it)
            verdict = _verdict(component, loaded, dtype)
            chosen: Dtype = dtype if verdict is None else "fp32"
            choice = choose_opset(chosen, opset)
            spec = component_spec(component, chosen, fixed)
            _export(component, loaded, spec, choice, chosen, folder / component.name)
            records[component.name] = ComponentRecord(
                class_name=component.class_name,
                dtype=chosen,
                dtype_reason=None if verdict is None else verdict.reason,
                overflow=verdict.overflow.to_dict() if verdict is not None and verdict.overflow is not None else None,
                opset=choice.opset,
                io=spec,
                content_hash=component.source.content_hash(),
                adapters=tuple(adapter.record() for adapter in on_it),
            )
    for name, files in pipeline.copied.items():
        (folder / name).mkdir()
        for file in files:
            shutil.copyfile(file, folder / name / file.name)
    _write_json(folder / INDEX_FILE, pipeline.index)
    return records


def _verdict(component: Component, loaded: LoadedComponent, dtype: Dtype) -> Verdict | None:
    if dtype != "fp16" or component.kind == "text_encoder":
        return None
    if component.source.config.get("force_upcast"):
        return Verdict("the VAE's config has force_upcast")
    return fails_in_half(loaded.module, _tried(component))


def _tried(component: Component) -> list[Tensor]:
    """For an encoder pictures: smooth, noisy, black and white. For a decoder what the encoder makes of them, and noise, both
    with the spread that the scaling factor stands for."""
    side = _WATCHED_LATENTS * scale_of(component)
    channels = component.source.config["in_channels"]
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, side)
    smooth = torch.stack([ramp[:, None] * ramp.roll(side * c // channels) for c in range(channels)])
    noisy = torch.rand((channels, side, side), generator=generator) * 2 - 1
    halves = torch.where(ramp > 0, 1.0, -1.0).expand(channels, side, side)
    pictures = torch.stack([smooth, noisy, halves])
    if component.kind == "vae_encoder":
        return [pictures]
    encoder = load_component(replace(component, name="vae_encoder", kind="vae_encoder")).module
    with torch.no_grad():
        mean = encoder(pictures)[0].chunk(2, dim=1)[0]
    mean /= mean.std() * component.source.config["scaling_factor"]  # of a trained VAE it has that spread already
    spec = component_spec(component, "fp32")
    sizes = {"batch_size": 2, "latent_height": _WATCHED_LATENTS, "latent_width": _WATCHED_LATENTS}
    return [*component_feeds(component, spec, sizes).values(), mean]


def _export(
    component: Component, loaded: LoadedComponent, spec: ModelSpec, choice: OpsetChoice, dtype: Dtype, folder: Path
) -> None:
    model = loaded.module.to(DTYPES[dtype])
    sizes = dict(_TRACED)
    if component.kind == "vae_encoder":
        sizes |= {axis: sizes[axis] * scale_of(component) for axis in ("sample_height", "sample_width")}
    feeds = component_feeds(component, spec, sizes)
    axes = (_dynamic_axes(component, spec),)
    graph = traced_graph(model, loaded.config, tuple(feeds.values()), {}, spec, axes, choice.opset, component.name)
    for value in list(graph.graph.initializers.values()):  # renaming changes the mapping
        if value.name is not None and value.name.startswith(loaded.prefix):
            value.name = value.name.removeprefix(loaded.prefix)
    folder.mkdir()
    save_graph(graph, folder, lambda written: None)
    check_model(folder / MODEL_NAME, spec, loaded.parameters)
    # the model is of the precision that it is to run in, and no pipeline can cast an ONNX model
    told = {} if component.kind == "text_encoder" else {"force_upcast": False}
    _write_json(folder / "config.json", dict(loaded.config) | told)


def _dynamic_axes(component: Component, spec: ModelSpec) -> dict[int, Any]:
    config = component.source.config
    (tensor,) = spec.inputs
    dims: dict[int, Any] = {}
    for index, axis in enumerate(tensor.axes):
        if not isinstance(axis, str):
            continue
        if axis == "batch_size":
            # as for the UNet: diffusers' upsampling takes another way from 64 samples on
            dims[index] = torch.export.Dim(axis, min=1, max=1 << 16 if component.kind == "text_encoder" else 63)
        elif axis == "sequence_length":
            dims[index] = torch.export.Dim(axis, min=1, max=config["max_position_embeddings"])
        else:
            multiple = scale_of(component) if component.kind == "vae_encoder" else 1
            dims[index] = multiple * torch.export.Dim(f"{axis}_over_{multiple}", min=1)
    return dims


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, default=list) + "\n", encoding="utf-8")
