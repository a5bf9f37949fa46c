"""Is each model of a pipeline beside its UNet equal to PyTorch in float32?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trexport.artifact import Artifact
from trexport.backends import BACKENDS, Device, OnnxFile
from trexport.io_spec import ModelSpec
from trexport.manifest import MODEL_NAME
from trexport.models.adapters import BoundAdapter, on_component
from trexport.models.component import component_feeds, load_component, scale_of
from trexport.models.pipeline import Component, Pipeline
from trexport.parity.metrics import max_abs, relative_l2
from trexport.parity.report import ComponentParity
from trexport.parity.tolerance import TOLERANCES
from trexport.progress import SILENT, Progress


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
    precision first, so that both see the same. PyTorch runs on the CPU, adapters on text encoders beside their weights.

    Raises:
        MissingError: ONNX Runtime is not here.
    """
    found = []
    for name, record in artifact.manifest.components.items():
        component = pipeline.components[name]
        with progress.task(name):
            reference = load_component(component, on_component(adapters, name), merged=False).module
            path = artifact.folder / name / MODEL_NAME
            with BACKENDS["onnxruntime"].load(OnnxFile(path, record.io), device) as runner:
                errors: dict[str, list[tuple[float, float]]] = {tensor.name: [] for tensor in record.io.outputs}
                shapes = shapes_of(component, record.io)
                for number, sizes in enumerate(shapes):
                    for seed in seeds if number == 0 else seeds[:1]:
                        feeds = component_feeds(component, record.io, sizes, seed=seed)
                        outputs = runner(feeds)
                        with torch.no_grad():
                            expected = reference(*(_widened(value) for value in feeds.values()))
                        for tensor, wanted in zip(record.io.outputs, expected, strict=True):
                            value = outputs[tensor.name].float().cpu()
                            errors[tensor.name].append((relative_l2(value, wanted), max_abs(value, wanted)))
        for output, values in errors.items():
            worst = max(values, key=lambda pair: (math.isnan(pair[0]), pair[0]))
            limit = TOLERANCES[record.dtype].relative_l2
            found.append(ComponentParity(name, output, record.dtype, len(values), *worst, limit))
    return found


def judge_components(components: Sequence[ComponentParity]) -> list[str]:
    """Why some are not equal. A NaN fails."""
    return [
        f"{entry.component}: relative L2 of {entry.output} is {entry.relative_l2:.3g}, above {entry.limit:.3g}"
        for entry in components
        if not entry.relative_l2 <= entry.limit
    ]


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


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
