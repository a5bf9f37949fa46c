"""One UNet for many runs: its adapted layers hold a weight for each.

A batch holds the images of all runs, run by run, and the adapted layers multiply each run's part with that run's weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trlora import find_targets

Shape = tuple[int, int]
"""Of a layer's weight, (out, in)."""


class StackedLinear(nn.Module):
    """A linear layer with a weight for each run, (runs, out, in), over a batch that holds the runs one after the other."""

    weight: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(self.weight), -1, x.shape[-1]) @ self.weight.transpose(1, 2)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


class StackedUNet:
    """A copy of the base, frozen, with `StackedLinear` in the place of its attention projections."""

    def __init__(self, base: nn.Module) -> None:
        self.model: Any = copy.deepcopy(base).eval().requires_grad_(False)
        targets = {path: module for path, module in find_targets(self.model).items() if isinstance(module, nn.Linear)}
        self.shapes: dict[str, Shape] = {path: (m.out_features, m.in_features) for path, m in targets.items()}
        self.paths: dict[Shape, list[str]] = {}
        for path, shape in self.shapes.items():
            self.paths.setdefault(shape, []).append(path)
        self.base_weights = {
            shape: torch.stack([targets[path].weight.detach() for path in paths]) for shape, paths in self.paths.items()
        }
        self.layers = {path: StackedLinear(module) for path, module in targets.items()}
        for path, layer in self.layers.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer)
        self._hint: Tensor | None = None
        self.model.conv_in.register_forward_hook(
            lambda _module, _inputs, y: y if self._hint is None else y + self._hint
        )

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    def __call__(
        self, weights: Mapping[Shape, Tensor], hint: Tensor | None, sample: Tensor, levels: Tensor, context: Tensor
    ) -> Tensor:
        """The prediction for a batch of all runs.

        Args:
            weights: for each shape (out, in) of layers the weights (runs, layers, out, in), in the order of `paths`.
            hint: what is added after the first convolution, (runs·B, 32, 16, 16).
            sample: (runs·B, 1, 16, 16), run by run, as are levels (runs·B,) and context (runs·B, 3, 32).
        """
        for shape, paths in self.paths.items():
            for path, weight in zip(paths, weights[shape].unbind(1), strict=True):
                self.layers[path].weight = weight
        self._hint = hint
        return self.model(sample, levels, context, return_dict=False)[0]
