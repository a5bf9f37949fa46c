"""The one number that says how large a member is, its rank or block size, and the sizes that there are for a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from trlora.errors import ShapeError, SpecError
from trlora.residuals import ResidualSpec
from trlora.shorthand import size_name
from trlora.transforms import TransformSpec

_Spec = TypeVar("_Spec", TransformSpec, ResidualSpec)

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def ladder(spec: _Spec, build: Callable[[_Spec], nn.Module], most: int) -> list[_Spec]:
    """A member's spec in every size that a layer takes, with ever more parameters.

    Args:
        spec: whose size is left aside; as it is where it has none.
        build: the member of a spec on the layer.
        most: parameters that the greatest may have.

    Returns:
        Empty where none fits.
    """
    name = size_name(type(spec))
    tried = [spec]
    if name is not None:
        tried = [dataclasses.replace(spec, **{name: size}) for size in _SIZES]  # type: ignore[type-var]
        if getattr(type(spec), name) is None:  # which asks for the member whole: the most that there is
            whole: _Spec = dataclasses.replace(spec, **{name: None})  # type: ignore[type-var]
            most = min(most, _parameters(whole, build) or 0)
            tried.insert(0, whole)
    counts: dict[int, _Spec] = {}
    for candidate in tried:
        count = _parameters(candidate, build)
        if count is not None and count <= most and (count or name is None):  # a size without parameters changes nothing
            counts.setdefault(count, candidate)
    return [counts[count] for count in sorted(counts)]


def _parameters(spec: Any, build: Callable[[Any], nn.Module]) -> int | None:
    """None for a size that does not go into the layer."""
    try:
        return sum(parameter.numel() for parameter in build(spec).parameters())
    except (SpecError, ShapeError):
        return None
