"""A bias and a residual in one node."""

from __future__ import annotations

import pytest

from tests.trexport.graph.passes.small import rewrite
from trexport.graph.passes.bias_add import bias_add

IO = "(float[2,5,6] x, float[2,5,8] z) => (float[2,5,8] y)"


@pytest.mark.parametrize("order", ["l, z", "z, l"])
@pytest.mark.parametrize("bias", ["p, bias", "bias, p"])
def test_bias_and_residual(order: str, bias: str) -> None:
    found = rewrite(
        f"{IO} {{ p = MatMul(x, w) l = Add({bias}) y = Add({order}) }}", bias_add, {"w": (6, 8), "bias": (8,)}
    )
    assert (found.sites, found.ops()) == (1, ["MatMul", "BiasAdd"])
    assert list(found.node("BiasAdd").input) == ["p", "bias", "z"]
    found.assert_same()


@pytest.mark.parametrize(
    "text",
    [
        f"{IO} {{ p = MatMul(x, w) y = Add(p, bias) }}",
        f"{IO.replace(') =>', ', float[1,5,8] r) =>')} {{ p = MatMul(x, w) l = Add(p, bias) y = Add(l, r) }}",
        f"{IO.replace('y)', 'y, float[2,5,8] t)')} {{ p = MatMul(x, w) l = Add(p, bias) y = Add(l, z) t = Relu(l) }}",
    ],
    ids=["no residual", "broadcast", "read twice"],
)
def test_others_are_left_alone(text: str) -> None:
    rewrite(text, bias_add, {"w": (6, 8), "bias": (8,)}).assert_untouched()
