"""The adapted weights of a whole model, built anew for every step in groups of equal layers.

An adapted layer that keeps its adapter factored launches a dozen small operators on every activation. Here the weights
`W' = diag(gain)·(Uᵀ·W0·T + Δ)` of all layers with equal shapes are computed together, and every layer is one product again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast, final

import torch
from torch import Tensor, nn

from trlora.inject import adapted_modules
from trlora.layers import AdaptedLayer, LayerAdapter
from trlora.training.parameter_stacks import gather_, look_again_
from trlora.training.weight_group import Build, Group


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
        compiled: build them by `torch.compile`, which takes a minute or two at the first step. The model itself is not
            compiled here.
        together: elements of the weights that are built together, at most: what stands in between is a few times as large,
            in float32. Fewer take less memory and more of the host's time.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "default",
        dtype: torch.dtype | None = None,
        *,
        compiled: bool = False,
        together: int = 2**25,
    ) -> None:
        self.name = name
        self.dtype = dtype
        layers = {path: layer for path, layer in adapted_modules(model).items() if _alone(layer, name)}
        self.paths = tuple(layers)
        """Of the layers that are built."""
        alike: dict[object, list[AdaptedLayer]] = {}
        for layer in layers.values():
            alike.setdefault(_kind(layer, name), []).append(layer)
        self.groups: list[Group] = []
        """Of layers that are built together."""
        self._known: dict[Group, tuple[tuple[float, ...], Tensor]] = {}
        for kind, group in alike.items():
            most = max(1, together // group[0].weight.numel())
            for first in range(0, len(group), most):
                self.groups.append(Group.of(group[first : first + most], name, kind, compiled=compiled))

    @contextmanager
    def built(self) -> Iterator[None]:
        """The layers' weights as the parameters are now; outside they are factored again."""
        try:
            for group in self.groups:
                look_again_(group)
                layers = group.layers
                dtype = self.dtype or layers[0].weight.dtype
                found = cast(Tensor, Build.apply(group, self._strengths(group), dtype, *group.inputs()))
                for layer, weight in zip(layers, found.view(-1, *layers[0].weight.shape).unbind(), strict=True):
                    vars(layer)["built"] = weight  # the module's own assignment takes as long as a kernel's launch
            yield
            for group in self.groups:
                gather_(group)
        finally:
            for group in self.groups:
                for layer in group.layers:
                    vars(layer)["built"] = None

    def _strengths(self, group: Group) -> Tensor:
        """(layers,); one at zero is its base, with gradients of zero. Kept while nothing changes: to copy a number to a
        GPU is to wait for it."""
        numbers = tuple(layer.strengths[self.name] for layer in group.layers)
        device = group.layers[0].weight.device
        known = self._known.get(group)
        if known is None or known[0] != numbers or (known[1].device, known[1].dtype) != (device, group.dtype):
            with torch.inference_mode(False):  # a step may come after a picture
                known = numbers, torch.tensor(numbers, dtype=group.dtype, device=device)
            self._known[group] = known
        return known[1]


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
