"""The UNet as a diffusers model, built from a `Base`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trexport.errors import BaseError, UsageError
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, Dtype, ModelSpec, TensorDtype, unet_spec
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.progress import SILENT, Progress
from trlora import LayerMerge, adapted_bias, attach_, merge_layer
from trlora.errors import nearest

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DTYPES: dict[TensorDtype, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
}


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A `UNet2DConditionModel` on the meta device: shapes, no memory.

    Raises:
        BaseError: diffusers cannot build the config.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(dict(config))
    except (ValueError, TypeError, KeyError) as error:
        raise BaseError(f"diffusers cannot build a UNet from this config: {error}") from error
    assert isinstance(model, UNet2DConditionModel)
    return model.eval().requires_grad_(False)


def load_unet(base: Base, dtype: Dtype = "fp32", *, progress: Progress = SILENT) -> UNet2DConditionModel:
    """The base model, on the CPU. Weights already in `dtype` stay memory-mapped.

    Raises:
        BaseError: a parameter is missing, unknown, or of another shape than the config asks for.
    """
    model = empty_unet(base.config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = base.shapes()
    for name, shape in found.items():
        if name not in expected:
            raise BaseError(f"{base.name}: {name} is no parameter of its config's UNet{nearest(name, expected)}")
        if shape != expected[name]:
            raise BaseError(f"{base.name}: {name} has shape {shape}, its config asks for {expected[name]}")
    missing = [name for name in expected if name not in found]
    if missing:
        raise BaseError(f"{base.name}: {len(missing)} of {len(expected)} parameters are missing, {missing[0]} first")
    with progress.task("load", len(expected)) as task:
        state: dict[str, Tensor] = {}
        for file in base.weights:
            for entry in file.entries:
                state[entry.name] = file.tensor(entry.name).to(DTYPES[dtype])
                task.advance(1)
        model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def merge_into_(model: nn.Module, adapters: Sequence[BoundAdapter], *, progress: Progress = SILENT) -> list[LayerMerge]:
    """Fold adapters into the weights of a model that `load_unet` made; computed in float32, cast once."""
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
        sizes: of all axes of `trexport.io_spec.FREE_AXES`.
    """
    model = empty_unet(base.config)
    rows: dict[str, int] = {}

    def record(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows[path] = output.numel() // output.shape[1 if isinstance(module, nn.Conv2d) else -1]

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_hook(record(path))
    spec = unet_spec(base.config, "fp32")
    feeds = {tensor.name: torch.empty(tensor.shape(sizes), device="meta") for tensor in spec.inputs}
    with torch.no_grad():
        call_unet(model, feeds)
    return rows


def call_unet(model: nn.Module, feeds: Mapping[str, Tensor]) -> Tensor:
    """One step: feeds by the names of `trexport.io_spec.unet_spec` → `out_sample`."""
    args, kwargs = call_arguments(feeds)
    return model(*args, **kwargs)[0]


def call_arguments(feeds: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The arguments with which diffusers' UNet takes `feeds`."""
    kwargs: dict[str, Any] = {"return_dict": False}
    if "text_embeds" in feeds:
        kwargs["added_cond_kwargs"] = {"text_embeds": feeds["text_embeds"], "time_ids": feeds["time_ids"]}
    return (feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"]), kwargs


def spread_timestep(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The feeds with a scalar `timestep` made one for each sample, where the model takes one for each."""
    wanted = next((tensor for tensor in spec.inputs if tensor.name == "timestep"), None)
    if wanted is None or not wanted.axes or "timestep" not in feeds or feeds["timestep"].dim():
        return feeds
    return {**feeds, "timestep": feeds["timestep"].expand(feeds["sample"].shape[0])}


def fitted(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The feeds of one step as a model takes them: those of `spec`, each in its dtype, a scalar `timestep` spread.

    Raises:
        UsageError: one is missing, of another rank or size, or its sizes contradict another's.
    """
    feeds = spread_timestep(spec, feeds)
    sizes: dict[str, int] = {}
    given: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        if tensor.name not in feeds:
            raise UsageError(f"{tensor.name}: missing; expected {[wanted.name for wanted in spec.inputs]}")
        value = feeds[tensor.name]
        fits = value.dim() == len(tensor.axes)
        for axis, size in zip(tensor.axes, value.shape, strict=False):
            fits = fits and size > 0 and size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
        if not fits:
            axes = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in tensor.axes]
            raise UsageError(f"{tensor.name}: shape {list(value.shape)} found, expected {axes}")
        given[tensor.name] = value.to(DTYPES[tensor.dtype])
    return given


def sizes_of(spec: ModelSpec, feeds: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of the free axes, read off the inputs that are fed."""
    sizes: dict[str, int] = {}
    for tensor in [tensor for tensor in spec.inputs if tensor.name in feeds]:
        for axis, size in zip(tensor.axes, feeds[tensor.name].shape, strict=True):
            if isinstance(axis, str):
                sizes[axis] = size
    return sizes


def random_feeds(
    spec: ModelSpec, sizes: Mapping[str, int], *, seed: int = 0, timestep: float = 500.0
) -> dict[str, Tensor]:
    """Inputs for one step, N(0, 1) but for the timestep, made in float32 and cast, so that every precision sees the same. A
    bank gets no adapter for any sample.

    Args:
        spec: the model's inputs.
        sizes: of the free axes.
    """
    generator = torch.Generator().manual_seed(seed)
    feeds: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        if tensor.name == "timestep":
            feeds[tensor.name] = torch.full(tensor.shape(sizes), float(timestep))
        elif tensor.name == ADAPTER_INDEX:
            feeds[tensor.name] = torch.zeros(tensor.shape(sizes), dtype=torch.int64)
        elif tensor.name == ADAPTER_STRENGTH:
            feeds[tensor.name] = torch.ones(tensor.shape(sizes))
        elif tensor.name == "time_ids":  # original size, crop, target size in pixels
            ids = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0])
            feeds[tensor.name] = ids.expand(tensor.shape(sizes)).to(DTYPES[tensor.dtype]).contiguous()
        else:
            feeds[tensor.name] = torch.randn(tensor.shape(sizes), generator=generator).to(DTYPES[tensor.dtype])
    return feeds
