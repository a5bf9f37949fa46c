"""Dividing a budget against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from trlora.fit import Point, within_budget, within_error

Curves = list[list[Point]]


def curves(seed: int, convex: bool) -> Curves:
    """Four layers with four sizes each; convex: every further parameter is worth less."""
    draw = random.Random(seed)
    found = []
    for _ in range(4):
        parameters, error, curve = 0, draw.uniform(1, 10), []
        step = draw.randint(1, 5)
        for _ in range(5):
            curve.append(Point(parameters, error))
            parameters += step if convex else draw.randint(1, 5)
            error *= 0.5 if convex else draw.uniform(0.3, 1.05)
        found.append(curve)
    return found


def cost(given: Curves, chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    points = [curve[number] for curve, number in zip(given, chosen, strict=True)]
    return sum(point.parameters for point in points), sum(point.squared_error for point in points)


def everything(given: Curves) -> list[tuple[int, float]]:
    return [cost(given, chosen) for chosen in itertools.product(*(range(len(curve)) for curve in given))]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("convex", [True, False])
def test_a_budget_is_kept_and_well_spent(seed: int, convex: bool) -> None:
    given = curves(seed, convex)
    for budget in (0, 7, 18, 60, 1000):
        parameters, error = cost(given, within_budget(given, budget))
        assert parameters <= budget
        best = min(error for parameters, error in everything(given) if parameters <= budget)
        assert best - 1e-12 <= error <= 1.3 * best
    assert error == pytest.approx(best)  # with more than enough


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("convex", [True, False])
def test_an_error_is_reached_with_few_parameters(seed: int, convex: bool) -> None:
    given = curves(seed, convex)
    all_of_them = everything(given)
    for share in (0.9, 0.5, 0.25):
        wanted = share * cost(given, [0] * 4)[1]
        best = min((parameters for parameters, error in all_of_them if error <= wanted), default=None)
        found = within_error(given, wanted)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            parameters, error = cost(given, found)
            assert error <= wanted
            assert best <= parameters <= best + 8
    assert within_error(given, 0.0) is None


def test_parameters_go_where_they_count() -> None:
    given = [[Point(0, 1.0), Point(10, 0.9)], [Point(0, 100.0), Point(10, 1.0)]]
    assert within_budget(given, 10) == [0, 1]
    assert within_error(given, 2.0) == [0, 1]
