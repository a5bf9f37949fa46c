"""`trexport onnx`: the UNet as an ONNX model, and with it the rest of its pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import onnx_ir as ir
import torch

from trexport.disk import check_disk
from trexport.errors import UsageError
from trexport.graph.check import check_model
from trexport.graph.components import components_size, export_components
from trexport.graph.exporter import run_exporter, save_graph, tidy
from trexport.graph.factored import Factored, FactoredOptions, default_tensors, plan_factored
from trexport.graph.opset import OpsetChoice, choose_opset
from trexport.graph.passes.factor import factor
from trexport.graph.passes.swap import swap
from trexport.graph.swappable import Swappable, SwappableOptions, plan_swappable, save_merge_model
from trexport.hashing import sha256_of_file
from trexport.io_spec import BYTES_OF, FREE_AXES, Dtype, ModelSpec, banked_spec, default_sizes, downscale_of, unet_spec
from trexport.manifest import MODEL_NAME, BaseRecord, Manifest, package_versions
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.pipeline import Component, Pipeline
from trexport.models.unet import call_arguments, load_unet, merge_into_, random_feeds
from trexport.progress import SILENT, Progress
from trlora.files import atomic_folder, check_free

UNET_FOLDER = "unet"


@final
@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    dtype: Dtype = "fp32"
    opset: int | None = None
    """None chooses, with the reason in the manifest."""
    fixed: Mapping[str, int] | None = None
    """Axes to fix, by name (see `trexport.io_spec.FREE_AXES`); the others stay free. None leaves all free."""
    factored: FactoredOptions | None = None
    """Keep the adapters factored, as operators of domain `ai.trlora`."""
    swappable: SwappableOptions | None = None
    """Keep them out, in weights that a second model computes. Without this and `factored` they are merged."""
    timestep_per_sample: bool = False
    """`timestep` is (batch,): samples at different steps share a batch, and servers that know no scalars take the model."""
    optimum: Mapping[str, int] | None = None
    """Sizes that free axes will mostly have, for the factored form's plan; the UNet's own where not given."""


@final
@dataclass(frozen=True)
class ExportPlan:
    """What an export is going to do."""

    choice: OpsetChoice
    spec: ModelSpec
    sizes: Mapping[str, int]
    """To trace with."""
    size_bytes: int
    """Of the weights."""
    factored: Factored | None = None
    swappable: Swappable | None = None
    components: Mapping[str, Component] = field(default_factory=dict)
    """Of the pipeline, to be exported too; `size_bytes` counts them."""
    left_out: Mapping[str, str] = field(default_factory=dict)


def export_onnx(
    base: Base,
    adapters: Sequence[BoundAdapter],
    out: Path,
    options: ExportOptions | None = None,
    *,
    pipeline: Pipeline | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Manifest:
    """Write `OUT/unet/model.onnx`, `model.onnx_data` and `config.json`, and `OUT/trexport.json`, with the adapters merged
    in, kept factored, or swappable (then with `merge.onnx` beside the model); names and layout are optimum's.

    Args:
        pipeline: the base's, to export all of it: see `trexport.graph.components`. None for the UNet alone.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is not set.
        UsageError: an opset or a size that cannot be.
        ExportError: the exporter failed, or its result is not a whole model.
    """
    options = options or ExportOptions()
    plan = plan_export(base, adapters, out, options, pipeline=pipeline, overwrite=overwrite)
    choice, spec, kept = plan.choice, plan.spec, plan.factored or plan.swappable
    with atomic_folder(out, overwrite=overwrite) as folder, ThreadPoolExecutor(1) as hashing:
        base_hash = hashing.submit(base.content_hash)
        # before the UNet, for they are small: what is wrong with one is said within seconds
        components = (
            {}
            if pipeline is None
            else export_components(
                pipeline, folder, options.dtype, options.opset, options.fixed, adapters, progress=progress
            )
        )
        model = load_unet(base, options.dtype, progress=progress)
        if kept is None:
            merge_into_(model, adapters, progress=progress)
        with progress.task("export"):
            graph = _export(model, spec, plan.sizes, choice)
            if plan.factored is not None:
                tensors = default_tensors(plan.factored, adapters)
                factor(graph, plan.factored.slots, tensors, plan.factored.plan, options.dtype, plan.factored.bank)
                spec = banked_spec(spec) if plan.factored.bank is not None else spec
            if plan.swappable is not None:
                swap(graph, plan.swappable.slot.layers)
        unet = folder / UNET_FOLDER
        unet.mkdir()
        with progress.task("save", base.size_bytes) as task:
            save_graph(graph, unet, lambda written: task.advance(written))
            if plan.swappable is not None:
                save_merge_model(unet / MODEL_NAME, plan.swappable.slot, options.dtype, choice.opset)
        names = [name for name, _ in model.named_parameters()]
        check_model(unet / MODEL_NAME, spec, names)
        config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (unet / "config.json").write_text(text, encoding="utf-8")
        with progress.task("hash"):
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in paths}
        manifest = Manifest(
            kind="onnx",
            form="factored" if plan.factored else "swappable" if plan.swappable else "merged" if adapters else "base",
            dtype=options.dtype,
            io=spec,
            base=BaseRecord(base.name, base_hash.result()),
            adapters=() if kept is not None and kept.blank else tuple(adapter.record() for adapter in adapters),
            files=files,
            factored=plan.factored.to_dict() if plan.factored else None,
            swappable=plan.swappable.to_dict() if plan.swappable else None,
            components=components,
            left_out=plan.left_out,
            opset=choice.opset,
            opset_reason=choice.reason,
            versions=package_versions(),
        )
        manifest.write(folder)
    return manifest


def plan_export(
    base: Base,
    adapters: Sequence[BoundAdapter],
    out: Path,
    options: ExportOptions,
    *,
    pipeline: Pipeline | None = None,
    overwrite: bool = False,
) -> ExportPlan:
    """What `export_onnx` would do, nothing written. Raises what it would raise before it writes."""
    choice = choose_opset(options.dtype, options.opset)
    sizes = check_sizes(base.config, options.fixed or {})
    check_free(out, overwrite=overwrite)
    size_bytes = sum(math.prod(shape) for shape in base.shapes().values()) * BYTES_OF[options.dtype]
    beside: dict[str, Any] = {}
    if pipeline is not None:
        size_bytes += components_size(pipeline, options.dtype)
        beside = {"components": pipeline.components, "left_out": pipeline.left_out}
    check_disk(out, size_bytes)
    spec = unet_spec(base.config, options.dtype, options.fixed, timestep_per_sample=options.timestep_per_sample)
    if options.swappable is not None:
        if options.factored is not None:
            raise UsageError("factored and swappable are two forms; choose one")
        return ExportPlan(
            choice, spec, sizes, size_bytes, None, plan_swappable(base, adapters, options.swappable), **beside
        )
    if options.factored is None:
        return ExportPlan(choice, spec, sizes, size_bytes, **beside)
    optimum = sizes | check_sizes(base.config, {**(options.optimum or {}), **(options.fixed or {})})
    return ExportPlan(
        choice, spec, sizes, size_bytes, plan_factored(base, adapters, optimum, options.factored), **beside
    )


def check_sizes(config: Mapping[str, Any], given: Mapping[str, int]) -> dict[str, int]:
    """The sizes to trace with: those given, the UNet's own for the rest.

    Raises:
        UsageError: a size below 1, or a height or width that the UNet's levels do not divide.
    """
    multiple = downscale_of(config)
    for axis, size in given.items():
        step = multiple if axis in ("height", "width") else 1
        if size < 1 or size % step:
            raise UsageError(f"{axis} {size} given, expected a positive multiple of {step}")
    return default_sizes(config) | dict(given)


def trace(model: torch.nn.Module, spec: ModelSpec, sizes: Mapping[str, int], opset: int) -> torch.onnx.ONNXProgram:
    """The exporter's program, not optimised: ONNX graph, decomposed torch graph, and names shared by both.

    Raises:
        ExportError: the exporter failed; its reason is the message.
    """
    args, kwargs = call_arguments(random_feeds(spec, sizes))
    shapes = _dynamic_shapes(spec, kwargs, multiple=downscale_of(model.config))  # type: ignore[arg-type]
    return run_exporter(model, args, kwargs, spec, shapes, opset)


def _export(model: torch.nn.Module, spec: ModelSpec, sizes: Mapping[str, int], choice: OpsetChoice) -> ir.Model:
    program = trace(model, spec, sizes, choice.opset)
    return tidy(program, spec, {name for name, _ in model.named_parameters()}, UNET_FOLDER)


def _dynamic_shapes(spec: ModelSpec, kwargs: Mapping[str, Any], multiple: int) -> dict[str, Any] | None:
    if not spec.free_axes:
        return None
    dims: dict[str, Any] = {}
    for axis in spec.free_axes:
        if axis in ("height", "width"):
            dims[axis] = multiple * torch.export.Dim(f"{axis}_over_{multiple}", min=1)
        elif axis == "batch_size":
            # diffusers' upsampling asks for contiguous memory from 64 samples on, which no ONNX graph knows of; without the
            # bound torch.export fails, refines the range and starts over, for twice the time
            dims[axis] = torch.export.Dim(axis, min=1, max=63)
        else:
            dims[axis] = torch.export.Dim(axis, min=1)
    shapes: dict[str, Any] = {
        tensor.name: {d: dims[axis] for d, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in spec.inputs
    }
    result = {name: shapes[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    if "added_cond_kwargs" in kwargs:
        result["added_cond_kwargs"] = {name: shapes[name] for name in kwargs["added_cond_kwargs"]}
    return result | {"return_dict": None}


def free_or_fixed(given: Mapping[str, int | None], *, static: bool, config: Mapping[str, Any]) -> dict[str, int]:
    """The axes to fix for `--static` and the size options: with `static`, all of them, at the UNet's own sizes where
    nothing is given; otherwise only those given."""
    chosen = {axis: size for axis, size in given.items() if size is not None}
    if not static:
        return chosen
    return {axis: chosen.get(axis, default_sizes(config)[axis]) for axis in FREE_AXES}
