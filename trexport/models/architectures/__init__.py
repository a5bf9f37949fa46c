"""Architectures: which models can be a base. A new one is one file here, one line in `ARCHITECTURES`, one entry in the
tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trexport.errors import BaseError, UsageError
from trexport.io_spec import Dtype, ModelSpec
from trexport.models.architectures.base import Architecture, Limit, Sampling
from trexport.models.architectures.clip_text import ClipText, ClipTextWithProjection
from trexport.models.architectures.controlnet import ControlNet
from trexport.models.architectures.flux import Flux
from trexport.models.architectures.sd3 import StableDiffusion3
from trexport.models.architectures.unet import UNet
from trlora.errors import nearest

ARCHITECTURES: dict[str, type[Architecture]] = {
    architecture.class_name: architecture
    for architecture in (UNet, StableDiffusion3, Flux, ControlNet, ClipText, ClipTextWithProjection)
}
"""Class of the model → its architecture."""

RANDOM: dict[str, dict[str, Any]] = {
    name: {**config, "_class_name": architecture.class_name}
    for architecture in ARCHITECTURES.values()
    for name, config in architecture.random.items()
}
"""The configs behind `random:NAME`, for measuring without a checkpoint."""

FOLDERS: tuple[str, ...] = tuple(dict.fromkeys(architecture.folder for architecture in ARCHITECTURES.values()))
"""Where models lie in pipelines and artifacts."""


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class of the model that a config is of: diffusers says it, or transformers does."""
    named = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    return named if isinstance(named, str) else None


def architecture_of(config: Mapping[str, Any], names: Sequence[str] = ()) -> Architecture:
    """The architecture that a model's config is of.

    Args:
        names: of its parameters, as its files have them.

    Raises:
        BaseError: none that is known.
    """
    found = class_of(config)
    if found not in ARCHITECTURES:
        known = list(ARCHITECTURES)
        raise BaseError(f"the model is a {found}, expected one of {known}{nearest(found or '', known)}")
    return ARCHITECTURES[found](config, names)


def architecture_of_model(model: nn.Module) -> type[Architecture]:
    """The architecture of a model in memory.

    Raises:
        BaseError: none that is known.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.is_of(model):
            return architecture
    raise BaseError(f"the model is a {type(model).__name__}, expected one of {list(ARCHITECTURES)}")


def spec_of(
    config: Mapping[str, Any],
    dtype: Dtype,
    sizes: Mapping[str, int] | None = None,
    *,
    timestep_per_sample: bool = False,
) -> ModelSpec:
    """The inputs and outputs of the model of a config: see `Architecture.spec`."""
    return architecture_of(config).spec(dtype, sizes, timestep_per_sample=timestep_per_sample)


def default_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Every axis of the model of a config, and the size that it is meant for."""
    return architecture_of(config).default_sizes()


def limits_of(config: Mapping[str, Any]) -> dict[str, Limit]:
    """Every axis of the model of a config, and what it can be."""
    architecture = architecture_of(config)
    given = architecture.limits()
    return {axis: given.get(axis, Limit()) for axis in architecture.default_sizes()}


def in_order(config: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, int]:
    """Sizes written one after the other, by axis.

    Raises:
        UsageError: more or fewer than the model has axes.
    """
    axes = default_sizes(config)
    if len(sizes) != len(axes):
        raise UsageError(f"{len(sizes)} sizes given, a {class_of(config)} has {len(axes)}: {', '.join(axes)}")
    return dict(zip(axes, sizes, strict=True))


__all__ = [
    "ARCHITECTURES",
    "FOLDERS",
    "RANDOM",
    "Architecture",
    "Limit",
    "Sampling",
    "architecture_of",
    "architecture_of_model",
    "class_of",
    "default_sizes",
    "in_order",
    "limits_of",
    "spec_of",
]
