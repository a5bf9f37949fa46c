"""A sum and its layer normalisation as one node, which ONNX Runtime runs on the CPU too."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from tests.trexport.graph.passes.small import Rewritten, rewrite
from trexport.graph.passes.skip_layer_norm import skip_layer_norm

NORM = "y = LayerNormalization<epsilon = 0.01>(s, gamma, beta)"


def rewritten(body: str, outputs: str = "float[2,5,8] y", more: str = "") -> Rewritten:
    text = f"(float[2,5,6] x, float[2,5,8] z{more}) => ({outputs}) {{ p = MatMul(x, w) {body} }}"
    return rewrite(text, skip_layer_norm, {"w": (6, 8), "gamma": (8,), "beta": (8,), "bias": (8,)})


@pytest.mark.parametrize("order", ["l, z", "z, l"])
@pytest.mark.parametrize("bias", ["p, bias", "bias, p"])
def test_with_a_bias(order: str, bias: str) -> None:
    found = rewritten(f"l = Add({bias}) s = Add({order}) {NORM}")
    assert (found.sites, found.ops()) == (1, ["MatMul", "SkipLayerNormalization"])
    assert list(found.node("SkipLayerNormalization").input) == ["p", "z", "gamma", "beta", "bias"]
    found.assert_same()


def test_without_a_bias() -> None:
    found = rewritten(f"s = Add(p, z) {NORM}")
    assert (found.sites, found.ops()) == (1, ["MatMul", "SkipLayerNormalization"])
    found.assert_same()


def test_a_sum_that_others_read() -> None:
    found = rewritten(f"l = Add(p, bias) s = Add(l, z) {NORM} t = Relu(s)", "float[2,5,8] y, float[2,5,8] t")
    assert found.ops() == ["MatMul", "SkipLayerNormalization", "Relu"]
    assert len(found.node("SkipLayerNormalization").output) == 4
    found.assert_same()
    feeds = {"x": np.ones((2, 5, 6), np.float32), "z": np.arange(80, dtype=np.float32).reshape(2, 5, 8)}
    for mine, wanted in zip(
        *(onnxruntime.InferenceSession(m.SerializeToString()).run(None, feeds) for m in (found.after, found.before)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, wanted, atol=1e-4)  # its own kernel


def test_a_biased_product_that_others_read_keeps_its_bias() -> None:
    found = rewritten(f"l = Add(p, bias) s = Add(l, z) {NORM} t = Relu(l)", "float[2,5,8] y, float[2,5,8] t")
    assert found.ops() == ["MatMul", "Add", "SkipLayerNormalization", "Relu"]
    found.assert_same()


@pytest.mark.parametrize(
    ("body", "more"),
    [
        (f"s = Add(p, r) {NORM}", ", float[1,5,8] r"),
        ("s = Add(p, z) y = LayerNormalization<axis = 1>(s, g2, b2)", ", float[5,8] g2, float[5,8] b2"),
        ("s = Mul(p, z) " + NORM, ""),
    ],
    ids=["broadcast", "two axes", "product"],
)
def test_others_are_left_alone(body: str, more: str) -> None:
    rewritten(body, more=more).assert_untouched()


def test_a_sum_that_is_given_out_stays() -> None:
    rewritten(f"s = Add(p, z) {NORM}", "float[2,5,8] y, float[2,5,8] s").assert_untouched()
