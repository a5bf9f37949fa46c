"""Weights that are replaced in place: `W' = W0 + Σ s_k (W'_k − W0)` into buffers that a loaded model goes on reading."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trlora.errors import ShapeError
from trlora.layers import LayerAdapter, weight_change
from trlora.swap.launch import Launches
from trlora.swap.nvrtc import kernel_for, missing
from trlora.swap.packed import pack
from trlora.swap.plan import Plan, plan_of

_PLANS = 4
"""Of adapters together that are kept; an adapter alone keeps its own."""


@final
@dataclass(frozen=True)
class SwapReport:
    """How a swap was done."""

    kernel: int
    """Layers that the kernel wrote."""
    launches: int
    torch: Mapping[str, str]
    """Layers that plain torch wrote → why."""
    unchanged: int
    """Layers that hold W0."""

    def __str__(self) -> str:
        parts = [f"{self.kernel} in {self.launches} launches of the CUDA kernel"] if self.kernel else []
        reasons = sorted(set(self.torch.values()), key=lambda reason: -list(self.torch.values()).count(reason))
        parts += [f"{list(self.torch.values()).count(reason)} by torch ({reason})" for reason in reasons]
        parts += [f"{self.unchanged} unchanged"] if self.unchanged else []
        return f"{self.kernel + len(self.torch) + self.unchanged} layers: {', '.join(parts)}"


@final
class PreparedAdapter:
    """An adapter on the device of a `WeightWriter`, in the form that it writes from."""

    def __init__(self, layers: Mapping[str, LayerAdapter], device: torch.device) -> None:
        self.layers = layers
        """On the CPU."""
        self.alone: _Swap | None = None
        self._device = device
        self._moved: dict[str, LayerAdapter] = {}

    def on_device(self, path: str) -> LayerAdapter:
        """A layer's adapter where the weights are; it stays there."""
        if path not in self._moved:
            self._moved[path] = deepcopy(self.layers[path]).to(self._device)
        return self._moved[path]


@final
class WeightWriter:
    """Writes weights with any adapters at any strengths, each time from W0.

    On a GPU of compute capability 8.0 and later, half-precision layers with a tensor ring or any small transform, and a
    tensor ring or any residual of low rank, are written by grouped launches of one CUDA kernel that reads W0 once and writes
    W' once. What it does not take, plain torch computes in float32; `SwapReport` says which and why.

    Args:
        pristine: layer path → W0, (out, in) or (out, in/groups, height, width).
        buffers: the same paths → where W' goes, same shapes, dtypes and devices. Their memory must stay where it is.

    Raises:
        ShapeError: the two do not match.
    """

    def __init__(self, pristine: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        for path in pristine.keys() | buffers.keys():
            kinds = [
                (tuple(of[path].shape), of[path].dtype, of[path].device) if path in of else None
                for of in (pristine, buffers)
            ]
            if kinds[0] != kinds[1]:
                raise ShapeError(f"{path}: a weight of {kinds[0]}, and a buffer of {kinds[1]} for it")
        self._pristine = dict(pristine)
        self._buffers = dict(buffers)
        self.device = next(iter(self._pristine.values())).device if pristine else torch.device("cpu")
        self._together: OrderedDict[tuple[int, ...], _Swap] = OrderedDict()
        self._streams: list[torch.cuda.Stream] = []

    def prepare(self, layers: Mapping[str, LayerAdapter]) -> PreparedAdapter:
        """Bring an adapter to the device, compile what it needs. The layers given stay as they are; paths that are not
        written here are left out."""
        own = {path: deepcopy(layer).cpu() for path, layer in layers.items() if path in self._pristine}
        prepared = PreparedAdapter(own, self.device)
        prepared.alone = self._swap([prepared])
        return prepared

    def write(self, active: Sequence[tuple[PreparedAdapter, float]]) -> SwapReport:
        """Write every buffer, on torch's current stream. Without adapters it is W0 to the last bit."""
        with torch.no_grad():
            swap = self._swap_of([adapter for adapter, _ in active])
            if swap.launches is not None:
                swap.launches([strength for _, strength in active], self._streams_for(len(swap.launches)))
            for path in swap.plan.torch:
                pairs = [(adapter.on_device(path), strength) for adapter, strength in active if path in adapter.layers]
                change = weight_change(self._pristine[path], pairs, torch.float32)
                base, buffer = self._pristine[path], self._buffers[path]
                if change is None:
                    buffer.copy_(base)
                elif buffer.dtype == change.dtype == base.dtype:
                    torch.add(change, base, out=buffer)
                else:
                    buffer.copy_(change.add_(base))
            rest = list(swap.plan.unchanged)
            if rest:
                torch._foreach_copy_([self._buffers[path] for path in rest], [self._pristine[path] for path in rest])
        return swap.report

    def not_finite(self, active: Sequence[tuple[PreparedAdapter, float]]) -> str | None:
        """The path of a layer whose buffer is not finite after a write of these adapters; None where all are. Waits for the
        device."""
        swap = self._swap_of([adapter for adapter, _ in active])
        flags = [] if swap.launches is None else swap.launches.wrong()
        if swap.plan.torch:
            sums = [self._buffers[path].sum(dtype=torch.float32) for path in swap.plan.torch]
            flags += (~torch.stack(sums).isfinite()).tolist()
        if not any(flags):
            return None
        paths = [*(path for group in swap.plan.groups for path in group.paths), *swap.plan.torch]
        return next(path for path, flag in zip(paths, flags, strict=True) if flag)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _swap_of(self, adapters: Sequence[PreparedAdapter]) -> _Swap:
        if len(adapters) == 1 and adapters[0].alone is not None:
            return adapters[0].alone
        key = tuple(id(adapter) for adapter in adapters)
        if key not in self._together:
            self._together[key] = self._swap(adapters)
        self._together.move_to_end(key)
        while len(self._together) > _PLANS:
            self._together.popitem(last=False)
        return self._together[key]

    def _swap(self, adapters: Sequence[PreparedAdapter]) -> _Swap:
        why_not = missing(self.device)
        limit: dict[str, int] = {}
        if why_not is None:
            properties = torch.cuda.get_device_properties(self.device)
            limit = {"shared_limit": properties.shared_memory_per_block_optin}
        with torch.no_grad():
            plan = plan_of(self._pristine, self._buffers, [adapter.layers for adapter in adapters], why_not, **limit)
            parts = []
            for group in plan.groups:
                weights = [self._pristine[path] for path in group.paths]
                rows = [weight.shape[0] for weight in weights]
                packed = [
                    pack(group.variant, number, rows, factors, self.device)
                    for number, factors in enumerate(group.factors)
                ]
                outs = [self._buffers[path] for path in group.paths]
                parts.append((kernel_for(group.variant, self.device), weights, outs, packed))
        for path in plan.torch:
            for adapter in adapters:
                if path in adapter.layers:
                    adapter.on_device(path)
        return _Swap(list(adapters), plan, Launches(parts) if parts else None)

    def _streams_for(self, launches: int) -> list[torch.cuda.Stream]:
        """Those beside the caller's own."""
        while len(self._streams) < launches - 1:
            self._streams.append(torch.cuda.Stream(self.device))
        return self._streams[: launches - 1]


@final
class _Swap:
    """A plan made ready."""

    def __init__(self, adapters: list[PreparedAdapter], plan: Plan, launches: Launches | None) -> None:
        self.adapters = adapters if len(adapters) > 1 else []  # their identities are keys; one alone holds this itself
        self.plan = plan
        self.launches = launches
        self.report = SwapReport(
            sum(len(group.paths) for group in plan.groups), len(plan.groups), plan.torch, len(plan.unchanged)
        )
