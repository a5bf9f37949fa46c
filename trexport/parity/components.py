"""Is each model of a pipeline beside its UNet equal to PyTorch in float32?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from trexport.artifact import Artifact
from trexport.backends import BACKENDS, Device, OnnxFile
from trexport.io_spec import Dtype, ModelSpec
from trexport.manifest import MODEL_NAME
from trexport.models.adapters import BoundAdapter, on_component
from trexport.models.base import open_base
from trexport.models.component import LoadedComponent, component_feeds, component_spec, load_component, scale_of
from trexport.models.pipeline import Component, Pipeline, open_pipeline
from trexport.parity.judge import least_effect
from trexport.parity.metrics import max_abs, relative_l2
from trexport.parity.report import ComponentParity
from trexport.parity.tolerance import TOLERANCES
from trexport.progress import SILENT, Progress

Feeds = Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class _Part:
    """A model of an artifact beside the one that denoises."""

    io: ModelSpec
    dtype: Dtype
    run: Callable[[Sequence[Feeds]], list[list[Tensor]]]
    """Its outputs for some inputs."""


def compare_components(
    artifact: Artifact,
    pipeline: Pipeline,
    adapters: Sequence[BoundAdapter],
    device: Device,
    seeds: Sequence[int],
    *,
    progress: Progress = SILENT,
) -> list[ComponentParity]:
    """Compare every output of every component over two shapes and some seeds; inputs are rounded to the component's
    precision first, so that both see the same. PyTorch runs on the CPU, adapters on text encoders beside their weights. Of a
    merged pipeline the components are the text encoders that adapters are in, as PyTorch loads them in float32.

    Args:
        pipeline: what the artifact was made from, see `Artifact.pipeline`.

    Raises:
        MissingError: ONNX Runtime is not here.
    """
    found = []
    for name, part in _parts(artifact, device).items():
        component = pipeline.components[name]
        cases = [
            component_feeds(component, part.io, sizes, seed=seed)
            for number, sizes in enumerate(shapes_of(component, part.io))
            for seed in (seeds if number == 0 else seeds[:1])
        ]
        with progress.task(name):
            on_it = on_component(adapters, name)
            outputs = part.run(cases)
            expected = _run(load_component(component, on_it, merged=False), cases)
            has_effect = any(adapter.strength for adapter in on_it)
            plain = _run(load_component(component), cases) if has_effect else None
        limit = TOLERANCES[part.dtype].relative_l2
        for number, tensor in enumerate(part.io.outputs):
            pairs = [(got[number], wanted[number]) for got, wanted in zip(outputs, expected, strict=True)]
            errors = [(relative_l2(got, wanted), max_abs(got, wanted)) for got, wanted in pairs]
            worst = max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]))
            effect = None
            if plain is not None:
                moved = zip(expected, plain, strict=True)
                effect = max(relative_l2(wanted[number], without[number]) for wanted, without in moved)
            found.append(ComponentParity(name, tensor.name, part.dtype, len(cases), *worst, limit, effect))
    return found


def judge_components(components: Sequence[ComponentParity]) -> list[str]:
    """Why some are not equal, or not moved by the adapters that are on them. A NaN fails."""
    failures = [
        f"{entry.component}: relative L2 of {entry.output} is {entry.relative_l2:.3g}, above {entry.limit:.3g}"
        for entry in components
        if not entry.relative_l2 <= entry.limit
    ]
    effects: dict[str, list[tuple[float, float]]] = {}
    for entry in components:
        if entry.effect is not None and entry.relative_l2 <= entry.limit:
            effects.setdefault(entry.component, []).append((entry.effect, entry.relative_l2))
    for name, pairs in effects.items():
        least = least_effect([error for _, error in pairs])
        if not any(effect >= least for effect, _ in pairs):
            most = max(effect for effect, _ in pairs)
            failures.append(
                f"{name}: the adapters move its outputs by {most:.3g} at most, expected at least {least:.3g}"
            )
    return failures


def shapes_of(component: Component, io: ModelSpec) -> list[dict[str, int]]:
    """Two shapes that differ in every free axis: small ones, for a VAE is as costly as several steps of a UNet."""
    free = io.free_axes
    if component.kind == "text_encoder":
        longest = component.source.config["max_position_embeddings"]
        pairs = {"batch_size": (1, 3), "sequence_length": (longest, max(2, longest // 2))}
    else:
        scale = scale_of(component) if component.kind == "vae_encoder" else 1
        tall, wide = io.inputs[0].axes[2:]
        pairs = {"batch_size": (1, 2), tall: (16 * scale, 12 * scale), wide: (16 * scale, 20 * scale)}
    return [{axis: sizes[number] for axis, sizes in pairs.items() if axis in free} for number in (0, 1)]


def _parts(artifact: Artifact, device: Device) -> dict[str, _Part]:
    manifest = artifact.manifest
    parts = {
        name: _Part(record.io, record.dtype, partial(_run_onnx, artifact.folder / name / MODEL_NAME, record.io, device))
        for name, record in manifest.components.items()
    }
    merged = open_pipeline(open_base(str(artifact.folder))) if manifest.text_encoders else None
    for name in manifest.text_encoders:
        assert merged is not None
        component = merged.components[name]
        parts[name] = _Part(component_spec(component, "fp32"), component.source.dtype, partial(_run_torch, component))
    return parts


def _run_onnx(path: Path, io: ModelSpec, device: Device, cases: Sequence[Feeds]) -> list[list[Tensor]]:
    with BACKENDS["onnxruntime"].load(OnnxFile(path, io), device) as runner:
        return [[found[tensor.name].float().cpu() for tensor in io.outputs] for found in map(runner, cases)]


def _run_torch(component: Component, cases: Sequence[Feeds]) -> list[list[Tensor]]:
    return _run(load_component(component), cases)


def _run(loaded: LoadedComponent, cases: Sequence[Feeds]) -> list[list[Tensor]]:
    with torch.no_grad():
        return [list(loaded.module(*(_widened(value) for value in feeds.values()))) for feeds in cases]


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
