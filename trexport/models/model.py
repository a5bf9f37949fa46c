"""The model in memory, built from a `Base`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trexport.errors import BaseError, UsageError
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, Dtype, ModelSpec, TensorDtype, parts_of
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import ARCHITECTURES, Architecture, architecture_of_model
from trexport.models.base import Base
from trexport.progress import SILENT, Progress
from trlora import LayerMerge, adapted_bias, attach_, merge_layer
from trlora.errors import nearest

DTYPES: dict[TensorDtype, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
}


def empty_model(architecture: Architecture) -> nn.Module:
    """A model on the meta device: shapes, no memory.

    Raises:
        BaseError: its class cannot be built from its config.
    """
    with torch.device("meta"):
        model = architecture.build()
    return model.eval().requires_grad_(False)


def load_model(base: Base, dtype: Dtype = "fp32", *, progress: Progress = SILENT) -> nn.Module:
    """The base model, on the CPU. Weights already in `dtype` stay memory-mapped.

    Raises:
        BaseError: a parameter is missing, unknown, or of another shape than the config asks for.
    """
    model = empty_model(base.architecture)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    left_out = base.architecture.not_loaded
    found = {name: shape for name, shape in base.shapes().items() if name.rpartition(".")[2] not in left_out}
    for name, shape in found.items():
        if name not in expected:
            raise BaseError(
                f"{base.name}: {name} is no parameter of its config's {base.architecture.class_name}"
                f"{nearest(name, expected)}"
            )
        if shape != expected[name]:
            raise BaseError(f"{base.name}: {name} has shape {shape}, its config asks for {expected[name]}")
    missing = [name for name in expected if name not in found]
    if missing:
        raise BaseError(f"{base.name}: {len(missing)} of {len(expected)} parameters are missing, {missing[0]} first")
    with progress.task("load", len(expected)) as task:
        state: dict[str, Tensor] = {}
        for file in base.weights:
            for entry in [entry for entry in file.entries if entry.name in found]:
                state[entry.name] = file.tensor(entry.name).to(DTYPES[dtype])
                task.advance(1)
        model.load_state_dict(state, assign=True)
    _fill_buffers_(model, base.architecture)
    return model.requires_grad_(False)


def _fill_buffers_(model: nn.Module, architecture: Architecture) -> None:
    """Give a model the constants that no file holds."""
    lacking = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not lacking:
        return
    with torch.random.fork_rng(devices=[]):
        whole = dict(architecture.build().named_buffers())
    for name in lacking:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_buffer(leaf, whole[name], persistent=False)


def merge_into_(model: nn.Module, adapters: Sequence[BoundAdapter], *, progress: Progress = SILENT) -> list[LayerMerge]:
    """Fold adapters into the weights of a model that `load_model` made; computed in float32, cast once."""
    records: list[LayerMerge] = []
    layers = layers_of(adapters)
    with progress.task("merge", len(layers)) as task:
        for path, pairs in layers.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            merged, record = merge_layer(path, layer.weight.data, pairs)
            # a new tensor: the old one may be a file's memory
            layer.weight = nn.Parameter(merged.to(layer.weight.dtype), requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(adapted_bias(layer.bias.data, pairs), requires_grad=False)
            records.append(record)
            task.advance(1)
    add_offsets_(model, adapters)
    return records


def add_offsets_(model: nn.Module, adapters: Sequence[BoundAdapter]) -> None:
    """Add the offsets of adapters to a model's parameters; computed in float32, cast once."""
    for name, pairs in offsets_of(adapters).items():
        path, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(path), leaf)
        # a new tensor: the old one may be a file's memory
        setattr(model.get_submodule(path), leaf, nn.Parameter(with_offsets(parameter.data, pairs), requires_grad=False))


def attach_all_(model: nn.Module, adapters: Sequence[BoundAdapter]) -> None:
    """Attach adapters to a model, kept factored, under the names `adapter0`, `adapter1`, …"""
    for index, adapter in enumerate(adapters):
        attach_(model, adapter.layers, name=f"adapter{index}", strength=adapter.strength)


def layers_of(adapters: Sequence[BoundAdapter]) -> dict[str, list[tuple[Any, float]]]:
    """Module path → the adapters on it with their strengths."""
    layers: dict[str, list[tuple[Any, float]]] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            layers.setdefault(path, []).append((layer, adapter.strength))
    return layers


def offsets_of(adapters: Sequence[BoundAdapter]) -> dict[str, list[tuple[Tensor, float]]]:
    """Parameter name → what adapters add to it, with their strengths."""
    offsets: dict[str, list[tuple[Tensor, float]]] = {}
    for adapter in adapters:
        for name, offset in adapter.adapter.offsets.items():
            offsets.setdefault(name, []).append((offset, adapter.strength))
    return offsets


def with_offsets(parameter: Tensor, offsets: Sequence[tuple[Tensor, float]]) -> Tensor:
    """`p + Σ s_k δ_k`, computed in float32 at least and cast once; `parameter` itself where every strength is zero."""
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    result = wide
    for offset, strength in offsets:
        result = result + offset.to(wide) * strength if strength != 0 else result
    return parameter if result is wide else result.to(parameter.dtype)


def beside_weights(base: Base, adapters: Sequence[BoundAdapter]) -> list[str]:
    """The parameters that adapters change beside the weights of linear layers and convolutions, by name: scaled biases, and
    what offsets are added to."""
    parameters = base.shapes()
    return [*offsets_of(adapters)] + [
        f"{path}.bias"
        for path, pairs in layers_of(adapters).items()
        if f"{path}.bias" in parameters and any(adapter.magnitude.scales_bias for adapter, _ in pairs)
    ]


def rows_of_layers(base: Base, sizes: Mapping[str, int], paths: Sequence[str]) -> dict[str, int]:
    """How many rows each of some layers gives in one step: tokens, or places of a convolution's output, times samples.
    Computed from shapes alone.

    Args:
        sizes: of all axes.
    """
    model = empty_model(base.architecture)
    rows: dict[str, int] = {}

    def record(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows[path] = output.numel() // output.shape[1 if isinstance(module, nn.Conv2d) else -1]

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_hook(record(path))
    feeds = random_feeds(base.architecture.spec("fp32"), sizes)
    with torch.no_grad():
        outputs_of(model, {name: tensor.to("meta") for name, tensor in feeds.items()})
    return rows


def first_output(model: nn.Module, feeds: Mapping[str, Tensor]) -> Tensor:
    """One step: feeds by the names of the architecture's spec → its first output, of what denoises the only one."""
    return outputs_of(model, feeds)[0]


def outputs_of(model: nn.Module, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One step: feeds by the names of the architecture's spec → its outputs. What chooses in a bank is left out."""
    architecture = architecture_of_model(model)
    given = {name: value for name, value in feeds.items() if name not in (ADAPTER_INDEX, ADAPTER_STRENGTH)}
    return architecture.outputs(model(**architecture.arguments(given)))


def spread_timestep(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The feeds with a scalar `timestep` made one for each sample, where the model takes one for each."""
    wanted = next((tensor for tensor in spec.inputs if tensor.name == "timestep"), None)
    if wanted is None or not wanted.axes or "timestep" not in feeds or feeds["timestep"].dim():
        return feeds
    return {**feeds, "timestep": feeds["timestep"].expand(batch_of(spec, feeds))}


def batch_of(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> int:
    """The number of samples that are fed."""
    return feeds[spec.inputs[0].name].shape[0]


def fitted(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The feeds of one step as a model takes them: those of `spec`, each in its dtype, a scalar `timestep` spread.

    Raises:
        UsageError: one is missing, of another rank or size, or its sizes contradict another's.
    """
    if spec.inputs[0].name in feeds:
        feeds = spread_timestep(spec, feeds)
    sizes: dict[str, int] = {}
    given: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        if tensor.name not in feeds:
            raise UsageError(f"{tensor.name}: missing; expected {[wanted.name for wanted in spec.inputs]}")
        value = feeds[tensor.name]
        fits = value.dim() == len(tensor.axes)
        for axis, size in zip(tensor.axes, value.shape, strict=False):
            fits = fits and size > 0 and size == _expected(axis, size, sizes)
        if not fits:
            axes = [_expected(axis, axis, sizes) for axis in tensor.axes]
            raise UsageError(f"{tensor.name}: shape {list(value.shape)} found, expected {axes}")
        given[tensor.name] = value.to(DTYPES[tensor.dtype])
    return given


def _expected(axis: int | str, otherwise: Any, sizes: dict[str, int]) -> Any:
    """The size of an axis: what it is fixed at, or what another input has made it; who names it first says it."""
    if isinstance(axis, int):
        return axis
    name, times, over = parts_of(axis)
    if name in sizes:
        return sizes[name] * times // over
    if isinstance(otherwise, int) and times == over == 1:
        sizes[name] = otherwise
    return otherwise


def sizes_of(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of the free axes, read off the inputs that are fed."""
    sizes: dict[str, int] = {}
    for tensor in [tensor for tensor in spec.inputs if tensor.name in feeds]:
        for axis, size in zip(tensor.axes, feeds[tensor.name].shape, strict=True):
            if isinstance(axis, str) and parts_of(axis) == (axis, 1, 1):
                sizes[axis] = size
    return sizes


def random_feeds(
    spec: ModelSpec, sizes: Mapping[str, int], *, seed: int = 0, timestep: float = 500.0
) -> dict[str, Tensor]:
    """Inputs for one step, N(0, 1) but for those that mean something else, made in float32 and cast, so that every precision
    sees the same. A bank gets no adapter for any sample.

    Args:
        spec: the model's inputs.
        sizes: of the free axes.
        timestep: from 0 to 1000, whatever the model counts in.
    """
    generator = torch.Generator().manual_seed(seed)
    architecture = ARCHITECTURES.get(spec.model)
    feeds: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        shape = tensor.shape(sizes)
        if tensor.name == "timestep":
            scale = 1.0 if architecture is None else architecture.timestep_scale
            feeds[tensor.name] = torch.full(shape, float(timestep) * scale)
        elif tensor.name == ADAPTER_INDEX:
            feeds[tensor.name] = torch.zeros(shape, dtype=torch.int64)
        elif tensor.name == ADAPTER_STRENGTH:
            feeds[tensor.name] = torch.ones(shape)
        else:
            example = Architecture.example if architecture is None else architecture.example
            feeds[tensor.name] = example(tensor.name, shape, generator).to(DTYPES[tensor.dtype])
    return feeds
