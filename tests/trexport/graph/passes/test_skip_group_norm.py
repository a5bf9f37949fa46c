"""A sum and its group normalisation as one node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.trexport.graph.passes.small import Rewritten, attributes, rewrite
from trexport.graph.passes.group_norm import group_norm
from trexport.graph.passes.skip_group_norm import skip_group_norm
from trexport.graph.passes.transposes import transposes

# channels last outside, so that nothing is between the sum and the norm
NORM = """n = GroupNormalization<num_groups = 4, epsilon = 0.01>(s, gamma, beta) g = Sigmoid(n) m = Mul(n, g)
  last = Transpose<perm = [0,2,3,1]>(m) y = Relu(last)"""
START = "a = Transpose<perm = [0,3,1,2]>(x) b = Transpose<perm = [0,3,1,2]>(z)"


def passes(model: ir.Model) -> int:
    group_norm(model)
    transposes(model)
    return skip_group_norm(model)


def rewritten(body: str, inputs: str = "float[2,5,7,8] z", outputs: str = "float[2,5,7,8] y") -> Rewritten:
    text = f"(float[2,5,7,8] x, {inputs}) => ({outputs}) {{ {body} }}"
    return rewrite(text, passes, {"gamma": (8,), "beta": (8,), "axes": np.array([2, 3])}, opset=21)


def test_a_residual() -> None:
    found = rewritten(f"{START} s = Add(a, b) {NORM}")
    assert (found.sites, found.ops()) == (1, ["SkipGroupNorm", "Relu"])
    assert attributes(found.node("SkipGroupNorm"))["activation"] == 1
    assert len(found.node("SkipGroupNorm").output) == 1
    found.assert_same()


def test_a_residual_that_others_read() -> None:
    body = f"{START} s = Add(a, b) r = Transpose<perm = [0,2,3,1]>(s) w = Mul(r, r) {NORM}"
    found = rewritten(body, outputs="float[2,5,7,8] y, float[2,5,7,8] w")
    assert found.sites == 1
    assert sorted(found.ops()) == ["Mul", "Relu", "SkipGroupNorm"]
    assert len(found.node("SkipGroupNorm").output) == 2
    found.assert_same()


@pytest.mark.parametrize("order", ["a, u", "u, a"])
def test_a_row_for_each_sample(order: str) -> None:
    body = f"a = Transpose<perm = [0,3,1,2]>(x) u = Unsqueeze(z, axes) s = Add({order}) {NORM}"
    found = rewritten(body, inputs="float[2,8] z")
    assert (found.sites, found.ops()) == (1, ["SkipGroupNorm", "Relu"])
    assert list(found.node("SkipGroupNorm").input) == ["x", "gamma", "beta", "z"]
    found.assert_same()


def test_a_sum_that_is_given_out_stays() -> None:
    body = f"{START} s = Add(a, b) {NORM}"
    found = rewritten(body, outputs="float[2,5,7,8] y, float[2,8,5,7] s")
    assert found.node("SkipGroupNorm").output
    found.assert_same()


def test_another_broadcast_stays() -> None:
    """A row for each place, not for each channel."""
    body = f"{START.split(' b =')[0]} s = Add(a, z) {NORM}"
    found = rewritten(body, inputs="float[2,1,5,7] z")
    assert found.sites == 0
    found.assert_same()
