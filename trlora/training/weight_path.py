"""The adapted weights of a whole model, built anew for every step in groups of equal layers.

An adapted layer that keeps its adapter factored launches a dozen small operators on every activation. Here the weights
`W' = diag(gain)·(Uᵀ·W0·T + Δ)` of all layers with equal shapes are computed together, and every layer is one product again.
What is saved for the backward pass is the parameters: the group is computed a second time there, so that neither T nor what
stands between W0 and W' is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trlora.inject import adapted_modules
from trlora.layers import AdaptedLayer, LayerAdapter

_TOGETHER = 2**25
"""Elements of the weights that are built together, at most: what stands in between is a few times as large, in float32."""


@final
class _Whole(nn.Module):
    """An adapter as a function of the layer's weight."""

    def __init__(self, adapter: LayerAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, weight: Tensor) -> Tensor:
        return self.adapter.whole(weight)


@final
@dataclass(frozen=True, eq=False)
class _Group:
    """Layers whose weights, and whose adapters' specs and shapes, are equal."""

    layers: tuple[AdaptedLayer, ...]
    functions: tuple[_Whole, ...]

    def weights(self, strengths: Tensor, dtype: torch.dtype) -> Tensor:
        """(layers, out, in) in `dtype`, differentiable in the adapters' parameters."""
        names = [name for name, _ in self.functions[0].named_parameters()]
        stacks = [torch.stack([function.get_parameter(name) for function in self.functions]) for name in names]
        template = self.functions[0]

        def built(strengths: Tensor, *stacks: Tensor) -> Tensor:
            base = torch.stack([layer.weight.detach() for layer in self.layers]).flatten(2).to(stacks[0].dtype)

            def one(weight: Tensor, *values: Tensor) -> Tensor:
                return cast(Tensor, torch.func.functional_call(template, dict(zip(names, values, strict=True)), weight))

            with torch.autocast(base.device.type, enabled=False):
                whole = torch.vmap(one)(base, *stacks)
                return torch.lerp(base, whole, strengths[:, None, None]).to(dtype)

        return cast(Tensor, checkpoint(built, strengths, *stacks, use_reentrant=False, preserve_rng_state=False))


@final
class WeightPath:
    """How the layers of a model are computed while it is trained: as dense layers whose weights follow the adapter.

    ```python
    path = WeightPath(model)
    with path.built():  # around the forward and the backward pass
        loss(model, batch).backward()
    ```

    A layer with several adapters, or whose adapter scales the bias, is left as it is; its outputs are the same.

    Args:
        model: with adapters from `inject_`.
        name: of the adapter.
        dtype: of the built weights: that of the products in mixed precision; the base's own unless given.
    """

    def __init__(self, model: nn.Module, name: str = "default", dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.dtype = dtype
        layers = {path: layer for path, layer in adapted_modules(model).items() if _alone(layer, name)}
        self.paths = tuple(layers)
        """Of the layers that are built."""
        alike: dict[object, list[AdaptedLayer]] = {}
        for layer in layers.values():
            alike.setdefault(_kind(layer, name), []).append(layer)
        self._groups: list[_Group] = []
        for group in alike.values():
            most = max(1, _TOGETHER // group[0].weight.numel())
            for first in range(0, len(group), most):
                chosen = tuple(group[first : first + most])
                self._groups.append(_Group(chosen, tuple(_Whole(_adapter(layer, name)) for layer in chosen)))

    @contextmanager
    def built(self) -> Iterator[None]:
        """The layers' weights as the parameters are now; outside they are factored again."""
        try:
            for group in self._groups:
                layers = group.layers
                # one at zero is its base, with gradients of zero
                numbers = [layer.strengths[self.name] for layer in layers]
                strengths = torch.tensor(numbers, dtype=_dtype(group), device=layers[0].weight.device)
                found = group.weights(strengths, self.dtype or layers[0].weight.dtype)
                for layer, weight in zip(layers, found.unbind(), strict=True):
                    layer.built = weight.view(layer.weight.shape)
            yield
        finally:
            for group in self._groups:
                for layer in group.layers:
                    layer.built = None


def _dtype(group: _Group) -> torch.dtype:
    return next(group.functions[0].parameters()).dtype


def _adapter(layer: AdaptedLayer, name: str) -> LayerAdapter:
    return cast(LayerAdapter, layer.adapters[name])


def _alone(layer: AdaptedLayer, name: str) -> bool:
    if list(layer.adapters) != [name]:
        return False
    adapter = _adapter(layer, name)
    return adapter.dtype is not None and not (adapter.magnitude.scales_bias and layer.bias is not None)


def _kind(layer: AdaptedLayer, name: str) -> object:
    adapter = _adapter(layer, name)
    shapes = tuple((key, value.shape, value.dtype) for key, value in adapter.named_parameters())
    return type(layer), adapter.spec, shapes, layer.weight.shape, layer.weight.dtype, layer.weight.device
