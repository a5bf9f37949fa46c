"""Dividing parameters among layers: which size each gets, so that the error of all together is small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final


@final
@dataclass(frozen=True)
class Point:
    """One size of one layer's adapter."""

    parameters: int
    squared_error: float


def within_budget(curves: Sequence[Sequence[Point]], budget: int) -> list[int]:
    """For each layer the number of its point, the sum of squared errors being small and the parameters at most `budget`.

    The next step is always the one that takes off most for its parameters, along the lower convex hulls (the optimum of the
    relaxed problem); what is left over goes to the best steps that still fit.

    Args:
        curves: of each layer, its first point what it costs to do least (nothing, for a layer that may be left out).
    """
    hulls = [_hull(curve) for curve in curves]
    spent = sum(curve[0].parameters for curve in curves)
    chosen = [0] * len(curves)
    for layer, point in _steps(curves, hulls):
        extra = curves[layer][point].parameters - curves[layer][chosen[layer]].parameters
        if spent + extra > budget:
            break
        chosen[layer], spent = point, spent + extra
    while True:
        best: tuple[float, int, int] | None = None
        for layer, curve in enumerate(curves):
            now = curve[chosen[layer]]
            for number, point in enumerate(curve):
                extra, gain = point.parameters - now.parameters, now.squared_error - point.squared_error
                if gain > 0 and spent + extra <= budget and (best is None or gain > best[0]):
                    best = (gain, layer, number)
        if best is None:
            return chosen
        _, layer, number = best
        spent += curves[layer][number].parameters - curves[layer][chosen[layer]].parameters
        chosen[layer] = number


def within_error(curves: Sequence[Sequence[Point]], squared_error: float) -> list[int] | None:
    """For each layer the number of its point, the parameters being few and the sum of squared errors at most what is asked;
    None where all of them together do not reach that.

    Along the lower convex hulls, as `within_budget`; then layers go back where that still holds.
    """
    hulls = [_hull(curve) for curve in curves]
    chosen = [0] * len(curves)

    def total() -> float:
        return math.fsum(curve[number].squared_error for curve, number in zip(curves, chosen, strict=True))

    for layer, point in _steps(curves, hulls):
        if total() <= squared_error:
            break
        chosen[layer] = point
    if total() > squared_error:
        return None
    while True:
        room, best = squared_error - total(), None
        for layer, curve in enumerate(curves):
            now = curve[chosen[layer]]
            for number, point in enumerate(curve):
                saved, loss = now.parameters - point.parameters, point.squared_error - now.squared_error
                if saved > 0 and loss <= room and (best is None or saved > best[0]):
                    best = (saved, layer, number)
        if best is None:
            return chosen
        before = chosen[best[1]]
        chosen[best[1]] = best[2]
        if total() > squared_error:  # by rounding
            chosen[best[1]] = before
            return chosen


def _steps(curves: Sequence[Sequence[Point]], hulls: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Every step along the hulls, (layer, its next point), the best for its parameters first."""
    found = []
    for layer, (curve, hull) in enumerate(zip(curves, hulls, strict=True)):
        for before, after in pairwise(hull):
            gain = curve[before].squared_error - curve[after].squared_error
            found.append((-gain / (curve[after].parameters - curve[before].parameters), layer, after))
    return [(layer, after) for _, layer, after in sorted(found)]


def _hull(curve: Sequence[Point]) -> list[int]:
    """The numbers of the points on the lower convex hull, from the first point to the least error."""
    order = sorted(range(len(curve)), key=lambda n: (curve[n].parameters, curve[n].squared_error))
    hull: list[int] = []
    for number in order[order.index(0) :]:
        point = curve[number]
        if hull and point.squared_error >= curve[hull[-1]].squared_error:
            continue
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull


def _slope(curve: Sequence[Point], before: int, after: int) -> float:
    cost = curve[after].parameters - curve[before].parameters
    return (curve[after].squared_error - curve[before].squared_error) / cost if cost else -math.inf
