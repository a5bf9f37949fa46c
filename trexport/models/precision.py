"""Can a VAE run in float16? Every tensor that it computes is watched in float32, and float16 is compared with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GREATEST_HALF = 65504.0
"""The greatest number that float16 holds."""
CLOSE_IN_HALF = 2.5e-3
"""Relative L2 to float32 that a float16 result may have: a little under what `trexport validate` asks of it."""


@final
@dataclass(frozen=True)
class Overflow:
    """The first tensor of a run that float16 cannot hold."""

    tensor: str
    """The module that computes it, or the parameter's name."""
    operator: str
    max_abs: float
    """Its greatest absolute value in float32."""

    def to_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "operator": self.operator, "max_abs": self.max_abs}


@final
@dataclass(frozen=True)
class Verdict:
    """Why a model must stay in float32."""

    reason: str
    overflow: Overflow | None = None


def fails_in_half(module: nn.Module, inputs: Sequence[Tensor]) -> Verdict | None:
    """Why a model cannot run in float16; None where it can.

    A float32 run on each input shows whether any tensor that an operator computes is beyond float16's range; where none is,
    it is run again with every weight and every operator's result rounded to float16, as a GPU stores them, and compared.
    That is as fast as float32 on a CPU, whose own float16 convolutions can be very slow.

    Args:
        module: float32, takes one tensor and returns a tuple; afterwards its weights have the bits that they had.
        inputs: realistic ones, float32.
    """
    expected = []
    inputs = [value.half().float() for value in inputs]  # so that both see the same
    for value in inputs:
        watch = _Watch(module)
        with torch.no_grad(), watch.modules(), watch:
            expected.append(module(value)[0])
        if watch.found is not None:
            found = watch.found
            return Verdict(
                f"{found.tensor} ({found.operator}) reaches {found.max_abs:.3g}, float16 ends at {GREATEST_HALF:g}",
                found,
            )
    state = {name: parameter.data for name, parameter in module.named_parameters()}
    try:
        for parameter in module.parameters():
            parameter.data = _rounded(parameter.data)
        with torch.no_grad(), _Half():
            results = [module(value)[0] for value in inputs]
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = state[name]
    errors = [_relative_l2(found, wanted) for found, wanted in zip(results, expected, strict=True)]
    worst = next((error for error in errors if math.isnan(error)), max(errors))
    if not worst <= CLOSE_IN_HALF:
        return Verdict(f"relative L2 of float16 to float32 is {worst:.2g}, the limit is {CLOSE_IN_HALF:g}")
    return None


def _relative_l2(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30)).item()


def _rounded(value: Any) -> Any:
    return value.half().float() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@final
class _Half(TorchDispatchMode):
    """Rounds what every operator computes to float16."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return tree_map(_rounded, func(*args, **(kwargs or {})))


@final
class _Watch(TorchDispatchMode):
    """Looks at what every operator computes, and remembers the first tensor out of range with the module it is in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: Overflow | None = None
        self._module = module
        self._path: list[str] = []
        for name, parameter in module.named_parameters():
            self._look(name, "parameter", parameter.data)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                self._look(self._path[-1] if self._path else "", str(func).split(".")[1], value)
        return result

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follow which module runs."""
        handles = []
        for name, module in self._module.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._path.pop()

    def _look(self, tensor: str, operator: str, value: Tensor) -> None:
        if self.found is None and value.numel():
            low, high = torch.aminmax(value)
            greatest = max(-low.item(), high.item())
            if not greatest <= GREATEST_HALF:  # a NaN is beyond it too
                self.found = Overflow(tensor, operator, greatest)
