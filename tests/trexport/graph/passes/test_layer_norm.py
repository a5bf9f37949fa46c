"""A layer normalisation without a sum before it, as that of a sum with zeros, which ONNX Runtime runs on the CPU too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trexport.graph.passes.small import Rewritten, Weights, attributes, rewrite
from trexport.graph.passes.layer_norm import layer_norm

NORM = "y = LayerNormalization<epsilon = 0.01>(s, gamma, beta)"
ROWS = {"gamma": (8,), "beta": (8,), "bias": (8,)}


def rewritten(
    body: str,
    weights: Weights = ROWS,
    *,
    x: str = "2,5,8",
    more: str = "",
    outputs: str = "",
    kind: str = "float",
) -> Rewritten:
    """A graph of `x`, whose output `y` has its shape."""
    text = f"({kind}[{x}] x{more}) => ({kind}[{x}] y{outputs}) {{ {body} }}"
    given = {name: value for name, value in weights.items() if name in body}
    return rewrite(text, layer_norm, given, half=kind == "float16")


@pytest.mark.parametrize("x", ["2,5,8", "N,5,8", "1,1,8"])
@pytest.mark.parametrize("axis", ["", "axis = -1, ", "axis = 2, "])
def test_without_a_sum(x: str, axis: str) -> None:
    found = rewritten(f"s = Sin(x) {NORM.replace('<', f'<{axis}')}", x=x)
    assert (found.sites, found.ops()) == (1, ["Sin", "ConstantOfShape", "SkipLayerNormalization"])
    assert attributes(found.node("SkipLayerNormalization")) == {"epsilon": pytest.approx(0.01)}
    found.assert_same(kernels=True)


def test_the_usual_epsilon() -> None:
    """It shows where a token hardly varies."""
    small = {"small": np.array([1e-3], np.float32)}
    found = rewritten("s = Mul(x, small) y = LayerNormalization(s, gamma, beta)", {**ROWS, **small})
    assert found.sites == 1
    found.assert_same(kernels=True)


@pytest.mark.parametrize("x", ["2,5,8", "N,5,8"])
@pytest.mark.parametrize("order", ["p, bias", "bias, p"])
def test_with_a_bias(x: str, order: str) -> None:
    found = rewritten(f"p = Sin(x) s = Add({order}) {NORM}", x=x)
    assert (found.sites, found.ops()) == (1, ["Sin", "ConstantOfShape", "SkipLayerNormalization"])
    node = found.node("SkipLayerNormalization")
    assert [node.input[0], *node.input[2:]] == ["p", "gamma", "beta", "bias"]
    assert len(node.output) == 1
    found.assert_same(kernels=True)


@pytest.mark.parametrize("body", ["s = Sin(x)", "p = Sin(x) s = Add(p, bias)"])
def test_half_precision(body: str) -> None:
    found = rewritten(f"{body} {NORM}", kind="float16")
    assert (found.sites, "Add" in found.ops()) == (1, False)
    found.assert_same(1e-2, kernels=True)


def test_rows_that_are_fed() -> None:
    more = "".join(f", float[8] {name}" for name in ROWS)
    found = rewritten(f"p = Sin(x) s = Add(p, bias) {NORM}", more=more)
    assert (found.sites, found.ops()) == (1, ["Sin", "ConstantOfShape", "SkipLayerNormalization"])
    found.assert_same(kernels=True)
    found.assert_same(fed=ROWS, kernels=True)


def test_a_sum_that_others_read() -> None:
    found = rewritten(f"p = Sin(x) s = Add(p, bias) {NORM} z = Relu(s)", outputs=", float[2,5,8] z")
    assert (found.sites, found.ops()) == (1, ["Sin", "ConstantOfShape", "SkipLayerNormalization", "Relu"])
    assert len(found.node("SkipLayerNormalization").output) == 4
    found.assert_same(kernels=True)


def test_a_sum_of_two_normalisations() -> None:
    body = f"p = Sin(x) s = Add(p, bias) {NORM} z = LayerNormalization(s, beta, gamma)"
    found = rewritten(body, outputs=", float[2,5,8] z")
    assert found.sites == 2
    assert sorted(found.ops()) == [*2 * ["ConstantOfShape"], "Sin", *2 * ["SkipLayerNormalization"]]
    found.assert_same(kernels=True)


def test_one_after_another() -> None:
    body = "a = LayerNormalization(x, gamma, beta) s = Add(a, bias)"
    found = rewritten(f"{body} {NORM}")
    assert (found.sites, sorted(found.ops())) == (2, [*2 * ["ConstantOfShape"], *2 * ["SkipLayerNormalization"]])
    found.assert_same(kernels=True)


def test_what_is_before_a_bias_may_be_read_and_given_out() -> None:
    found = rewritten(f"p = Sin(x) s = Add(p, bias) {NORM} z = Relu(p)", outputs=", float[2,5,8] z, float[2,5,8] p")
    assert (found.sites, "Add" in found.ops()) == (1, False)
    found.assert_same(kernels=True)


@pytest.mark.parametrize(
    ("body", "more", "weights"),
    [
        ("s = Add(x, r)", ", float[8] r", {}),
        ("s = Add(x, r)", ", float[2,5,8] r", {}),
        ("s = Add(x, row)", "", {"row": (1,)}),
        ("s = Add(x, row)", "", {"row": (1, 8)}),
        ("s = Add(x, row)", "", {"row": (5, 8)}),
        ("p = ReduceMax(x, last) s = Add(p, row)", "", {"row": (8,), "last": np.array([2])}),
        ("s = Sub(x, row)", "", {"row": (8,)}),
    ],
    ids=["fed", "residual", "number", "row of a matrix", "every token", "wider than what it is added to", "difference"],
)
def test_sums_that_are_no_bias_stay_before_it(body: str, more: str, weights: Weights) -> None:
    found = rewritten(f"{body} {NORM}", {**ROWS, **weights}, more=more)
    assert found.sites == 1
    assert found.ops()[-2:] == ["ConstantOfShape", "SkipLayerNormalization"]
    assert {"Add", "Sub"} & set(found.ops())
    found.assert_same(kernels=True)


@pytest.mark.parametrize(
    ("body", "x"),
    [
        (NORM, "2,T,8"),
        (NORM, "N,T,8"),
        (NORM, "5,8"),
        (NORM, "2,3,5,8"),
        ("y = LayerNormalization(s, gamma)", "2,5,8"),
        ("y = LayerNormalization<axis = 1>(s, gamma, beta)", "2,5,8"),
        ("y = LayerNormalization<axis = 1>(s, matrix, matrix)", "2,5,8"),
        ("y = LayerNormalization<axis = -2>(s, matrix, matrix)", "2,5,8"),
        ("y = LayerNormalization<axis = 2>(s, matrix, matrix)", "2,3,5,8"),
        ("y = InstanceNormalization(s, gamma, beta)", "2,8,8"),
    ],
)
def test_others_are_left_alone(body: str, x: str) -> None:
    rewritten(f"s = Sin(x) {body}", {**ROWS, "matrix": (5, 8)}, x=x).assert_untouched()


def test_a_free_width_is_left_alone() -> None:
    rewritten(f"s = Sin(x) {NORM}", {}, x="2,5,W", more=", float[W] gamma, float[W] beta").assert_untouched()


def test_means_that_are_read_are_left_alone() -> None:
    body = "s = Sin(x) y, mean, deviation = LayerNormalization(s, gamma, beta)"
    rewritten(body, outputs=", float[2,5,1] mean").assert_untouched()


@pytest.mark.parametrize("body", ["s = Sin(x)", "p = Sin(x) s = Add(p, bias)"])
def test_what_is_given_out_is_left_alone(body: str) -> None:
    rewritten(f"{body} {NORM}", outputs=", float[2,5,8] s").assert_untouched()


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(1,), (1, 8), (5, 8), (5, 1)], ids=str)
def test_scales_and_shifts_that_are_stretched_are_left_alone(name: str, shape: tuple[int, ...]) -> None:
    """ONNX has them, the kernel has not."""
    rewritten(f"s = Sin(x) {NORM}", {**ROWS, name: shape}).assert_untouched()
