"""`trexport onnx`: a model as an ONNX model, and with it the rest of its pipeline."""

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
from trexport.graph.exporter import run_exporter, save_graph
from trexport.graph.factored import Factored, FactoredOptions, default_tensors, plan_factored
from trexport.graph.opset import OpsetChoice, choose_opset
from trexport.graph.passes.factor import factor
from trexport.graph.passes.swap import swap
from trexport.graph.swappable import Swappable, SwappableOptions, plan_swappable, save_merge_model
from trexport.graph.traced import traced_graph
from trexport.hashing import sha256_of_file
from trexport.io_spec import BYTES_OF, Dtype, ModelSpec, banked_spec, parts_of
from trexport.manifest import MODEL_NAME, BaseRecord, Manifest, package_versions
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import Limit, architecture_of, architecture_of_model, default_sizes, limits_of
from trexport.models.base import Base
from trexport.models.model import load_model, merge_into_, random_feeds
from trexport.models.pipeline import Component, Pipeline
from trexport.progress import SILENT, Progress
from trlora.files import atomic_folder, check_free


@final
@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    dtype: Dtype = "fp32"
    opset: int | None = None
    """None chooses, with the reason in the manifest."""
    fixed: Mapping[str, int] | None = None
    """Axes to fix, by name (see `trexport.models.architectures`); the others stay free. None leaves all free."""
    factored: FactoredOptions | None = None
    """Keep the adapters factored, as operators of domain `ai.trlora`."""
    swappable: SwappableOptions | None = None
    """Keep them out, in weights that a second model computes. Without this and `factored` they are merged."""
    timestep_per_sample: bool = False
    """`timestep` is (batch,): samples at different steps share a batch, and servers that know no scalars take the model."""
    optimum: Mapping[str, int] | None = None
    """Sizes that free axes will mostly have, for the factored form's plan; the model's own where not given."""


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
    """Write `OUT/unet/model.onnx` (or `transformer`, … as the architecture says), `model.onnx_data` and `config.json`, and
    `OUT/trexport.json`, with the adapters merged in, kept factored, or swappable (then with `merge.onnx` beside the model);
    names and layout are optimum's.

    Args:
        pipeline: the base's, to export all of it: see `trexport.graph.components`. None for the model alone.

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
        # before the large one, for they are small: what is wrong with one is said within seconds
        components = (
            {}
            if pipeline is None
            else export_components(
                pipeline, folder, options.dtype, options.opset, options.fixed, adapters, progress=progress
            )
        )
        model = load_model(base, options.dtype, progress=progress)
        if kept is None:
            merge_into_(model, adapters, progress=progress)
        with progress.task("export"):
            graph = _export(model, base, spec, plan.sizes, choice.opset)
            if plan.factored is not None:
                tensors = default_tensors(plan.factored, adapters)
                factor(graph, plan.factored.slots, tensors, plan.factored.plan, options.dtype, plan.factored.bank)
                spec = banked_spec(spec) if plan.factored.bank is not None else spec
            if plan.swappable is not None:
                swap(graph, plan.swappable.slot.layers)
        inner = folder / base.architecture.folder
        inner.mkdir()
        with progress.task("save", base.size_bytes) as task:
            save_graph(graph, inner, lambda written: task.advance(written))
            if plan.swappable is not None:
                save_merge_model(inner / MODEL_NAME, plan.swappable.slot, options.dtype, choice.opset)
        names = [name for name, _ in model.named_parameters()]
        check_model(inner / MODEL_NAME, spec, names)
        config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (inner / "config.json").write_text(text, encoding="utf-8")
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
    spec = base.architecture.spec(options.dtype, options.fixed, timestep_per_sample=options.timestep_per_sample)
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
    """The sizes to trace with: those given, the model's own for the rest.

    Raises:
        UsageError: an axis that the model does not have, or a size that it does not take.
    """
    limits = limits_of(config)
    chosen = architecture_of(config).sizes(given)
    for axis, size in chosen.items():
        limit = limits[axis]
        if size < 1 or size % limit.multiple or size > (limit.most or size):
            most = f", {limit.most} at most" if limit.most else ""
            raise UsageError(f"{axis} {size} given, expected a positive multiple of {limit.multiple}{most}")
    return default_sizes(config) | chosen


def trace(
    model: torch.nn.Module, config: Mapping[str, Any], spec: ModelSpec, sizes: Mapping[str, int], opset: int
) -> torch.onnx.ONNXProgram:
    """The exporter's program, not optimised: ONNX graph, decomposed torch graph, and names shared by both.

    Args:
        config: the model's, as its base has it.

    Raises:
        ExportError: the exporter failed; its reason is the message.
    """
    return run_exporter(model, (), _arguments(model, spec, sizes), spec, dynamic_shapes(config, spec), opset)


def _export(model: torch.nn.Module, base: Base, spec: ModelSpec, sizes: Mapping[str, int], opset: int) -> ir.Model:
    return traced_graph(
        model,
        base.config,
        (),
        _arguments(model, spec, sizes),
        spec,
        dynamic_shapes(base.config, spec),
        opset,
        base.architecture.folder,
    )


def _arguments(model: torch.nn.Module, spec: ModelSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What to trace with."""
    traced = {axis: max(2, size) if axis in spec.free_axes else size for axis, size in sizes.items()}
    return architecture_of_model(model).arguments(random_feeds(spec, traced))  # torch takes a 1 for a constant


def dynamic_shapes(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any] | None:
    """The free axes of every argument of the model's `forward`, as `torch.export` takes them; None where all are fixed."""
    if not spec.free_axes:
        return None
    limits = limits_of(config)
    dims = {axis: (_dim(axis, limits[axis]), limits[axis].multiple) for axis in spec.free_axes}

    def of(axis: str) -> Any:
        name, times, _ = parts_of(axis)
        dim, multiple = dims[name]
        return times * multiple * dim if times * multiple > 1 else dim

    free = {
        tensor.name: {d: of(axis) for d, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in spec.inputs
    }
    arguments = architecture_of(config).arguments(free)
    return {name: value if isinstance(value, dict) else None for name, value in arguments.items()}


def _dim(axis: str, limit: Limit) -> Any:
    """An axis, or what it is a multiple of."""
    most = limit.most or limit.most_traced
    name = axis if limit.multiple == 1 else f"{axis}_over_{limit.multiple}"
    return torch.export.Dim(name, min=1, max=None if most is None else most // limit.multiple)


def free_or_fixed(given: Mapping[str, int | None], *, static: bool, config: Mapping[str, Any]) -> dict[str, int]:
    """The axes to fix for `--static` and the size options: with `static`, all of them, at the model's own sizes where
    nothing is given; otherwise only those given."""
    chosen = architecture_of(config).sizes(given)
    return default_sizes(config) | chosen if static else chosen
