"""The gate of a feed-forward layer as one node."""

from __future__ import annotations

from functools import partial

import pytest

from tests.trexport.graph.passes.small import Rewritten, rewrite
from trexport.graph.passes.bias_split_gelu import bias_split_gelu

BODY = """
  p = MatMul(x, w) l = Add(p, bias) a, b = Split<axis = 2, num_outputs = 2>(l)
  g = Gelu(b) m = Mul(a, g) y = Relu(m)
"""


def rewritten(body: str, width: int = 10, widths: tuple[int, ...] | None = (10,)) -> Rewritten:
    text = f"(float[2,5,6] x) => (float[2,5,{width}] y) {{ {body} }}"
    run = bias_split_gelu if widths is None else partial(bias_split_gelu, widths=widths)
    return rewrite(text, run, {"w": (6, 2 * width), "bias": (2 * width,)})


@pytest.mark.parametrize("change", [("", ""), ("Mul(a, g)", "Mul(g, a)"), ("axis = 2", "axis = -1")])
def test_gate(change: tuple[str, str]) -> None:
    found = rewritten(BODY.replace(*change) if change[0] else BODY)
    assert (found.sites, found.ops()) == (1, ["MatMul", "BiasSplitGelu", "Relu"])
    assert list(found.node("BiasSplitGelu").input) == ["p", "bias"]
    found.assert_same()


def test_widths_that_the_kernel_has() -> None:
    assert rewritten(BODY, 1280, None).sites == 1
    rewritten(BODY, 1281, None).assert_untouched()


@pytest.mark.parametrize(
    "change",
    [
        ("Gelu(b)", 'Gelu<approximate = "tanh">(b)'),
        ("Mul(a, g)", "Mul(a, b)"),
        ("Mul(a, g)", "Add(a, g)"),
        ("Relu(m)", "Mul(m, b)"),
        ("Add(p, bias)", "Sub(p, bias)"),
    ],
)
def test_others_are_left_alone(change: tuple[str, str]) -> None:
    rewritten(BODY.replace(*change)).assert_untouched()


def test_the_halves_in_another_order() -> None:
    """The gelu of the first half is another function."""
    rewritten(BODY.replace("Gelu(b)", "Gelu(a)").replace("Mul(a, g)", "Mul(b, g)")).assert_untouched()
