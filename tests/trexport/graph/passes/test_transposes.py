"""Transposes of images that meet and vanish."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trexport.graph.passes.small import Rewritten, Weights, attributes, rewrite
from trexport.graph.passes.transposes import transposes

# everything starts and ends with its channels last: (2, 5, 7, 6)
START = "a = Transpose<perm = [0,3,1,2]>(x) b = Transpose<perm = [0,3,1,2]>(z)"
END = "last = Transpose<perm = [0,2,3,1]>(c) y = Relu(last)"


def rewritten(body: str, result: str = "2,5,7,6", more: str = "", weights: Weights | None = None) -> Rewritten:
    io = f"(float[2,5,7,6] x, float[2,5,7,6] z{more}) => (float[{result}] y)"
    return rewrite(f"{io} {{ {START} {body} {END} }}", transposes, weights)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_arithmetic(op: str) -> None:
    found = rewritten(f"c = {op}(a, b)")
    assert (found.sites, found.ops()) == (3, [op, "Relu"])
    found.assert_same()


def test_arithmetic_with_a_number() -> None:
    found = rewritten("d = Mul(a, two) e = Sigmoid(d) c = Add(e, b)", weights={"two": np.array(2, np.float32)})
    assert (found.sites, found.ops()) == (3, ["Mul", "Sigmoid", "Add", "Relu"])
    found.assert_same()


def test_a_row_for_each_sample() -> None:
    found = rewritten(
        "u = Unsqueeze(t, axes) d = Add(a, u) c = Add(d, b)", more=", float[2,6] t", weights={"axes": np.array([2, 3])}
    )
    assert (found.sites, found.ops()) == (3, ["Unsqueeze", "Add", "Add", "Relu"])
    found.assert_same()


@pytest.mark.parametrize("axis", [1, -3, 2])
def test_concatenation(axis: int) -> None:
    found = rewritten(f"c = Concat<axis = {axis}>(a, b)", "2,5,7,12" if axis in (1, -3) else "2,10,7,6")
    assert (found.sites, found.ops()) == (3, ["Concat", "Relu"])
    assert attributes(found.node("Concat")) == {"axis": 3 if axis in (1, -3) else 1}
    found.assert_same()


@pytest.mark.parametrize("given", ["scales", "sizes"])
def test_resizing(given: str) -> None:
    end = {"scales": "(d, , scales)", "sizes": "(d, , , sizes)"}[given]
    values = {"scales": np.array([1, 1, 2, 3], np.float32), "sizes": np.array([2, 6, 10, 21])}
    how = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
    body = f"d = Add(a, b) c = Resize<{how}>{end}"
    found = rewritten(body, "2,10,21,6", weights={given: values[given]})
    assert (found.sites, found.ops()) == (3, ["Add", "Resize", "Relu"])
    found.assert_same()


def test_several_readers_share_what_moved() -> None:
    found = rewritten("d = Add(a, b) e = Mul(d, a) f = Add(e, d) c = Add(f, b)")
    assert (found.sites, found.ops()) == (3, ["Add", "Mul", "Add", "Add", "Relu"])
    found.assert_same()


def test_an_image_of_the_other_layout_stops_it() -> None:
    found = rewritten("d = Mul(a, b) c = Add(d, i)", more=", float[2,6,5,7] i")
    assert (found.sites, found.ops()) == (1, ["Mul", "Transpose", "Add", "Transpose", "Relu"])
    found.assert_same()


def test_a_channel_wise_constant_stops_it() -> None:
    found = rewritten("d = Mul(a, b) c = Mul(d, w)", weights={"w": (6, 1, 1)})
    assert (found.sites, found.ops()) == (1, ["Mul", "Transpose", "Mul", "Transpose", "Relu"])
    found.assert_same()


def test_other_permutations_stay() -> None:
    body = "a = Transpose<perm = [0,3,1,2]>(x) y = Transpose<perm = [0,1,3,2]>(a)"
    rewrite(f"(float[2,5,7,6] x) => (float[2,6,7,5] y) {{ {body} }}", transposes).assert_untouched()


def test_an_output_keeps_its_layout() -> None:
    text = "(float[2,5,7,6] x) => (float[2,6,5,7] y) { a = Transpose<perm = [0,3,1,2]>(x) y = Sigmoid(a) }"
    found = rewrite(text, transposes)
    assert found.ops() == ["Sigmoid", "Transpose"]
    found.assert_same()
