"""Folding adapters into the dense weights of a model, in place."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from trlora.errors import TargetError
from trlora.inject import adapted_modules, remove_
from trlora.layers import LayerAdapter, adapted_bias, weight_change


@final
@dataclass(frozen=True)
class LayerMerge:
    """What merging did to one layer."""

    path: str
    relative_change: float
    """`‖W' − W0‖_F / ‖W0‖_F`, in the compute dtype, before the final cast; Inf where W0 is zero and W' is not."""
    seconds: float


@final
@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Printing it shows the totals and the layers that changed most."""

    layers: tuple[LayerMerge, ...]

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Layers with an adapter whose weight stayed the same."""
        return tuple(layer.path for layer in self.layers if layer.relative_change == 0)

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers merged in {self.seconds:.2f} s, {len(self.unchanged)} of them unchanged",
            "relative change  layer",
        ]
        most = sorted(self.layers, key=lambda layer: -layer.relative_change)[:10]
        lines += [f"{layer.relative_change:15.3e}  {layer.path}" for layer in most]
        return "\n".join(lines)


def merge_layer(
    path: str, weight: Tensor, adapters: list[tuple[LayerAdapter, float]], compute_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, LayerMerge]:
    """The merged weight of one layer, and the record of it.

    Args:
        path: the layer's path, for the record.
        weight: W0, (out, in), or of a convolution (out, in/groups, height, width).
        adapters: pairs of adapter and strength.

    Returns:
        Its shape in `compute_dtype`, or `weight` itself where nothing changes: cast it once, where it goes.
    """
    start = time.perf_counter()
    with torch.no_grad():
        change = weight_change(weight, adapters, compute_dtype)
        if change is None:
            return weight, LayerMerge(path, 0.0, time.perf_counter() - start)
        base = weight.to(compute_dtype)
        norm, moved = torch.linalg.vector_norm(base).item(), torch.linalg.vector_norm(change).item()
        merged = change.add_(base)
    relative = moved / norm if norm else (math.inf if moved else 0.0)
    return merged, LayerMerge(path, relative, time.perf_counter() - start)


def merge_(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> MergeReport:
    """Fold every adapter, at its strength, into the weight it is on, and into the bias where it scales that, and take the
    adapters out.

    Each is computed in `compute_dtype` and cast once to its own dtype.

    Raises:
        TargetError: the model has no adapters.
    """
    layers = adapted_modules(model)
    if not layers:
        raise TargetError(f"{type(model).__name__} has no adapters to merge; use inject_ or attach_ first")
    records = []
    for path, layer in layers.items():
        merged, record = merge_layer(path, layer.weight.data, layer.active(), compute_dtype)
        with torch.no_grad():
            layer.weight.copy_(merged)
            if layer.bias is not None:
                layer.bias.copy_(adapted_bias(layer.bias, layer.active(), compute_dtype))
        records.append(record)
    remove_(model)
    return MergeReport(tuple(records))
