"""Arithmetic that does nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trexport.graph.passes.small import rewrite
from trexport.graph.passes.neutral import neutral

ONE, TWO = np.array(1, np.float32), np.array(2, np.float32)


@pytest.mark.parametrize("expression", ["Div(a, one)", "Mul(a, one)", "Mul(one, a)"])
def test_ones_go(expression: str) -> None:
    text = f"(float[2,3] x) => (float[2,3] y) {{ a = Relu(x) b = {expression} y = Relu(b) }}"
    found = rewrite(text, neutral, {"one": ONE})
    assert (found.sites, found.ops()) == (1, ["Relu", "Relu"])
    found.assert_same()


@pytest.mark.parametrize(
    ("expression", "one"),
    [
        ("Div(one, a)", ONE),
        ("Mul(a, one)", TWO),
        ("Sub(a, one)", ONE),
        ("Mul(a, one)", np.ones((1, 1, 1), np.float32)),  # one axis more than a has
        ("Mul(a, one)", np.ones(3, np.float32)),
    ],
)
def test_what_does_something_stays(expression: str, one: np.ndarray) -> None:
    text = f"(float[2,3] x) => (float y) {{ a = Relu(x) b = {expression} y = ReduceSum<keepdims = 0>(b) }}"
    rewrite(text, neutral, {"one": one}).assert_untouched()


def test_a_one_that_can_be_fed_stays() -> None:
    text = "(float[2,3] x, float one) => (float[2,3] y) { a = Mul(x, one) y = Relu(a) }"
    rewrite(text, neutral, {"one": ONE}).assert_untouched()


def test_the_name_of_an_output_stays() -> None:
    rewrite("(float[2,3] x) => (float[2,3] y) { y = Div(x, one) }", neutral, {"one": ONE}).assert_untouched()
