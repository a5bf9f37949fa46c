"""Putting adapters into a model and taking them out again, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trlora.errors import TargetError, nearest
from trlora.layers import ADAPTABLE, AdaptedLayer, LayerAdapter, adapted
from trlora.spec import AdapterSpec
from trlora.targets import Targets, find_targets, modules_of


def inject_(
    model: nn.Module,
    spec: AdapterSpec,
    targets: Targets = "attention",
    *,
    overrides: Mapping[str, AdapterSpec] | None = None,
    name: str = "default",
    strength: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Give every target a new adapter at its start, and freeze everything else in the model.

    Args:
        model: any model with `nn.Linear` or `nn.Conv2d` modules.
        spec: what each adapter is.
        targets: see `trlora.targets.find_targets`.
        overrides: another spec for some module paths.
        name: the adapter's name.
        seed: of the random part of the start; the same seed gives the same cores.

    Returns:
        The paths of the adapted modules.

    Raises:
        TargetError: nothing is chosen, or an override names no chosen module.
        SpecError, ShapeError: the spec cannot be built for a layer; the model is left as it was.
    """
    found = find_targets(model, targets)
    overrides = overrides or {}
    for path in overrides:
        if path not in found:
            raise TargetError(f"the override for {path!r} names no target{nearest(path, found)}")
    generator = torch.Generator().manual_seed(seed)
    adapters = {
        path: LayerAdapter.from_spec(overrides.get(path, spec), weight.shape[1], weight.shape[0], generator, weight)
        for path, weight in ((path, base.weight.detach().flatten(1)) for path, base in found.items())
    }
    model.requires_grad_(False)
    attach_(model, adapters, name=name, strength=strength)
    return list(found)


def attach_(
    model: nn.Module, adapters: Mapping[str, LayerAdapter], *, name: str = "default", strength: float = 1.0
) -> None:
    """Put existing adapters on the modules whose paths are given, beside those that are there.

    To attach a checkpoint: `adapter = load_adapter(path)`, then
    `attach_(model, adapter.bind(shapes_of(model)), strength=adapter.config.strength)`.

    Raises:
        TargetError: a path names neither `nn.Linear` nor `nn.Conv2d`, or the adapter's name is taken. Nothing is attached
            then.
        ShapeError: an adapter does not fit its layer. Nothing is attached then.
    """
    wrapped: dict[str, AdaptedLayer] = {}
    known = modules_of(model)
    added: list[AdaptedLayer] = []
    try:
        for path, adapter in adapters.items():
            module = known.get(path)
            if module is None:
                raise TargetError(f"no module {path!r} in {type(model).__name__}{nearest(path, known)}")
            if isinstance(module, AdaptedLayer):
                layer = module
            elif isinstance(module, ADAPTABLE):
                layer = wrapped[path] = adapted(module)
            else:
                raise TargetError(f"{path} is a {type(module).__name__}, expected an nn.Linear or nn.Conv2d")
            layer.add(name, adapter, strength)
            added.append(layer)
    except Exception:
        for layer in added:
            del layer.adapters[name], layer.strengths[name]
        raise
    for path, layer in wrapped.items():
        _replace(model, path, layer)


def remove_(model: nn.Module) -> list[str]:
    """Take every adapter out: each adapted layer becomes the very module that it wrapped.

    Returns:
        The paths restored.
    """
    layers = adapted_modules(model)
    for path, layer in layers.items():
        _replace(model, path, layer.base)
    return list(layers)


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def set_strengths_(model: nn.Module, strengths: Mapping[str, float]) -> None:
    """Set the strength of adapters by name, in every layer that has them.

    Raises:
        TargetError: no layer has an adapter of that name.
    """
    layers = adapted_modules(model).values()
    names = {name for layer in layers for name in layer.adapters}
    for name, strength in strengths.items():
        if name not in names:
            raise TargetError(f"no adapter {name!r} in the model{nearest(name, names)}; found {sorted(names)}")
        for layer in layers:
            if name in layer.adapters:
                layer.set_strength(name, strength)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weights of a model's linear layers, (out, in), and convolutions, (out, in/groups, height, width), adapted or not,
    by module path."""
    return {
        path: tuple(module.weight.shape)
        for path, module in modules_of(model).items()
        if isinstance(module, (*ADAPTABLE, AdaptedLayer))
    }


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
