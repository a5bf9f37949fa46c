"""What adapted layers of every kind share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trlora.errors import ShapeError, TargetError
from trlora.layers.adapter import LayerAdapter
from trlora.layers.change import adapted_bias, adapted_weight


class AdaptedLayer(nn.Module, ABC):
    """A layer, left as it is, with any number of named adapters, each with a strength.

    The forward pass keeps the adapters out of the base weight. It computes each in the dtype of its own parameters (keep
    cores in float32 beside a half-precision base) and returns the base layer's dtype.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.strengths: dict[str, float] = {}
        self.built: Tensor | None = None
        """The adapted weight, in the shape of the base's, while somebody keeps it up to date (`trlora.training.WeightPath`);
        the forward pass is then the base layer's with that weight."""

    @property
    def weight(self) -> Tensor:
        """The base weight, untouched: what code that asks a layer for its dtype or device reads."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def add(self, name: str, adapter: LayerAdapter, strength: float = 1.0) -> None:
        """Add an adapter.

        Raises:
            ShapeError: it does not fit the layer.
            TargetError: the name is taken, empty, or one that `nn.ModuleDict` does not allow (a dot, `keys`).
            ValueError: the strength is NaN or Inf.
        """
        outputs, inputs = self.weight.shape[0], self.weight.shape[1:].numel()
        if (adapter.in_features, adapter.out_features) != (inputs, outputs):
            raise ShapeError(
                f"adapter {name!r} is for {adapter.in_features} → {adapter.out_features} features, "
                f"the layer has {inputs} → {outputs}"
            )
        if not name or "." in name or hasattr(self.adapters, name):  # an adapter there is an attribute as well
            raise TargetError(f"adapter name {name!r} cannot be used: expected a new name without dots")
        self.strengths[name] = _finite(name, strength)
        self.adapters[name] = adapter.to(self.weight.device)

    def set_strength(self, name: str, strength: float) -> None:
        """Set the strength of one adapter. Raises `TargetError` for an unknown name, `ValueError` for NaN or Inf."""
        if name not in self.adapters:
            raise TargetError(f"no adapter {name!r} here, found {sorted(self.adapters)}")
        self.strengths[name] = _finite(name, strength)

    def active(self) -> list[tuple[LayerAdapter, float]]:
        """The adapters whose strength is not zero, with it."""
        return [(self._adapter(name), self.strengths[name]) for name in self.adapters if self.strengths[name] != 0]

    def merged_weight(self, compute_dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight with every adapter at its strength; see `adapted_weight`."""
        return adapted_weight(self.weight, self.active(), compute_dtype)

    def merged_bias(self, compute_dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The bias with every adapter at its strength, None where the layer has none; see `adapted_bias`."""
        return None if self.bias is None else adapted_bias(self.bias, self.active(), compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output."""
        return self._factored(x) if self.built is None else self._dense(x, self.built)

    @abstractmethod
    def _factored(self, x: Tensor) -> Tensor:
        """The output with the adapters kept out of the base weight."""

    @abstractmethod
    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output of the base layer with another weight."""

    def _adapter(self, name: str) -> LayerAdapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, LayerAdapter)
        return adapter


def _finite(name: str, strength: float) -> float:
    if not math.isfinite(strength):
        raise ValueError(f"strength {strength} of adapter {name!r}, expected a finite number")
    return float(strength)
