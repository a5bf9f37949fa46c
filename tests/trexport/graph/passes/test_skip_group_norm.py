"""A sum and its group normalisation as one node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.trexport.graph.passes.small import Rewritten, Weights, attributes, rewrite
from trexport.graph.passes.group_norm import group_norm
from trexport.graph.passes.nhwc_conv import nhwc_conv
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


def rewritten(
    body: str,
    inputs: str = "float[2,5,7,8] z",
    outputs: str = "float[2,5,7,8] y",
    weights: Weights | None = None,
    *,
    half: bool = False,
) -> Rewritten:
    text = f"(float[2,5,7,8] x, {inputs}) => ({outputs}) {{ {body} }}"
    text = text.replace("float[", "float16[") if half else text
    given = {"gamma": (8,), "beta": (8,), "axes": np.array([2, 3]), **(weights or {})}
    return rewrite(text, passes, given, opset=21, half=half)


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


def test_a_sum_with_its_channels_last_that_is_given_out_stays() -> None:
    norm = "com.microsoft.GroupNorm<groups = 4, epsilon = 0.01, activation = 0, channels_last = 1>"
    text = "(float[2,5,7,8] x, float[2,5,7,8] z) => (float[2,5,7,8] y, float[2,5,7,8] s) <float[2,5,7,8] n>"
    body = f"s = Add(x, z) n = {norm}(s, gamma, beta) y = Relu(n)"
    rewrite(f"{text} {{ {body} }}", skip_group_norm, {"gamma": (8,), "beta": (8,)}, checked=False).assert_untouched()


def test_another_broadcast_stays() -> None:
    """A row for each place, not for each channel."""
    body = f"{START.split(' b =')[0]} s = Add(a, z) {NORM}"
    found = rewritten(body, inputs="float[2,1,5,7] z")
    assert found.sites == 0
    found.assert_same()


PRODUCT = "p = MatMul(x, w) l = Add(p, bias)"
SUM = "a = Transpose<perm = [0,3,1,2]>(l) b = Transpose<perm = [0,3,1,2]>(z) s = Add(a, b)"
BIASED: Weights = {"w": (8, 8), "bias": (8,)}


@pytest.mark.parametrize("order", ["(a, b)", "(b, a)"])
@pytest.mark.parametrize("bias", ["(p, bias)", "(bias, p)"])
@pytest.mark.parametrize("half", [False, True])
def test_the_bias_of_a_product(order: str, bias: str, half: bool) -> None:
    body = f"{PRODUCT} {SUM} {NORM}".replace("(p, bias)", bias).replace("(a, b)", order)
    found = rewritten(body, weights=BIASED, half=half)
    assert (found.sites, [op for op in found.ops() if op != "Cast"]) == (1, ["MatMul", "SkipGroupNorm", "Relu"])
    image, _, _, skip, row = found.node("SkipGroupNorm").input
    assert ({image, skip}, row) == ({"p", "z"}, "bias")
    found.assert_same(2e-2 if half else 1e-5)


@pytest.mark.parametrize("inputs", ["float[N,5,7,8] z", "float[N,H,W,8] z"])
def test_free_sizes(inputs: str) -> None:
    body = f"{PRODUCT} {SUM} {NORM}"
    text = f"({inputs.replace('z', 'x')}, {inputs}) => ({inputs.replace('z', 'y')}) {{ {body} }}"
    found = rewrite(text, passes, {"gamma": (8,), "beta": (8,), **BIASED}, opset=21)
    assert (found.sites, found.ops()) == (1, ["MatMul", "SkipGroupNorm", "Relu"])
    found.assert_same()


TWO = f"{PRODUCT} q = MatMul(z, w) k = Add(q, row) {SUM.replace('(z)', '(k)')} {NORM}"


def test_the_biases_of_two_products_are_added_beforehand() -> None:
    found = rewritten(TWO, weights={**BIASED, "row": (8,)})
    assert (found.sites, sorted(found.ops())) == (1, ["Add", "MatMul", "MatMul", "Relu", "SkipGroupNorm"])
    assert set(found.node("Add").input) == {"bias", "row"}
    found.assert_same()


@pytest.mark.parametrize("fed", ["bias", "row"])
def test_of_two_biases_one_of_which_is_fed_the_second_stays(fed: str) -> None:
    found = rewritten(TWO, f"float[2,5,7,8] z, float[8] {fed}", weights={**BIASED, "row": (8,)})
    assert (found.sites, sorted(found.ops())) == (1, ["Add", "MatMul", "MatMul", "Relu", "SkipGroupNorm"])
    assert set(found.node("Add").input) != {"bias", "row"}
    found.assert_same()
    found.assert_same(fed=[fed])


CONV = "o = Conv<kernel_shape = [3,3], pads = [1,1,1,1]>(a, k, bias)"
KERNEL: Weights = {"k": (8, 8, 3, 3), "bias": (8,)}


def convolved(model: ir.Model) -> int:
    nhwc_conv(model)
    return passes(model)


def with_convolution(body: str, inputs: str, weights: Weights, outputs: str = "") -> Rewritten:
    text = f"(float[2,5,7,8] x, float[2,5,7,8] z{inputs}) => (float[2,5,7,8] y{outputs}) {{ {START} {body} {NORM} }}"
    given = {"gamma": (8,), "beta": (8,), "axes": np.array([2, 3]), **weights}
    return rewrite(text, convolved, given, opset=21)


@pytest.mark.parametrize("order", ["(o, b)", "(b, o)"])
def test_the_bias_of_a_convolution(order: str) -> None:
    found = with_convolution(f"{CONV} s = Add{order}", "", KERNEL)
    assert (found.sites, found.ops()) == (1, ["Transpose", "NhwcConv", "SkipGroupNorm", "Relu"])
    assert len(found.node("NhwcConv").input) == 2
    assert found.node("SkipGroupNorm").input[4] == "bias"
    found.assert_same(1e-4)


def test_the_bias_of_a_convolution_and_a_row_for_each_sample() -> None:
    found = with_convolution(f"{CONV} u = Unsqueeze(t, axes) s = Add(o, u)", ", float[2,8] t", KERNEL)
    assert found.sites == 1
    assert len(found.node("NhwcConv").input) == 2
    assert list(found.node("SkipGroupNorm").input)[3:] == ["t", "bias"]
    found.assert_same(1e-4)


def test_the_biases_of_a_block_and_its_shortcut() -> None:
    """Two convolutions, as where a residual block changes its width, and others read the sum."""
    body = (
        f"{CONV} v = Conv<kernel_shape = [1,1]>(b, l, row) s = Add(v, o) r = Transpose<perm = [0,2,3,1]>(s) w = Relu(r)"
    )
    found = with_convolution(body, "", {**KERNEL, "l": (8, 8, 1, 1), "row": (8,)}, ", float[2,5,7,8] w")
    assert found.sites == 1
    assert [len(node.input) for node in found.after.graph.node if node.op_type == "NhwcConv"] == [2, 2]
    assert set(found.node("Add").input) == {"bias", "row"}
    assert len(found.node("SkipGroupNorm").output) == 2
    found.assert_same(1e-4)


def test_a_convolution_that_others_read_keeps_its_bias() -> None:
    body = f"{CONV} q = Transpose<perm = [0,2,3,1]>(o) w = Relu(q) s = Add(o, b)"
    found = with_convolution(body, "", KERNEL, ", float[2,5,7,8] w")
    assert found.sites == 1
    assert len(found.node("NhwcConv").input) == 3
    assert len(found.node("SkipGroupNorm").input) == 4
    found.assert_same(1e-4)


def test_a_bias_and_a_row_for_each_sample() -> None:
    body = f"{PRODUCT} a = Transpose<perm = [0,3,1,2]>(l) u = Unsqueeze(z, axes) s = Add(a, u) {NORM}"
    found = rewritten(body, "float[2,8] z", weights=BIASED)
    assert (found.sites, found.ops()) == (1, ["MatMul", "SkipGroupNorm", "Relu"])
    assert list(found.node("SkipGroupNorm").input) == ["p", "gamma", "beta", "z", "bias"]
    found.assert_same()


def test_the_row_keeps_a_bias_of_its_own() -> None:
    body = f"e = MatMul(z, w) t = Add(e, bias) {START.split(' b =')[0]} u = Unsqueeze(t, axes) s = Add(a, u) {NORM}"
    found = rewritten(body, "float[2,8] z", weights=BIASED)
    assert (found.sites, found.ops()) == (1, ["MatMul", "Add", "SkipGroupNorm", "Relu"])
    found.assert_same()


def test_a_bias_in_a_sum_that_others_read() -> None:
    body = f"{PRODUCT} {SUM} r = Transpose<perm = [0,2,3,1]>(s) v = Mul(r, r) {NORM}"
    found = rewritten(body, outputs="float[2,5,7,8] y, float[2,5,7,8] v", weights=BIASED)
    assert (found.sites, sorted(found.ops())) == (1, ["MatMul", "Mul", "Relu", "SkipGroupNorm"])
    found.assert_same()


def test_a_bias_that_is_fed() -> None:
    found = rewritten(f"{PRODUCT} {SUM} {NORM}", "float[2,5,7,8] z, float[8] bias", weights=BIASED)
    assert (found.sites, found.ops()) == (1, ["MatMul", "SkipGroupNorm", "Relu"])
    found.assert_same()
    found.assert_same(fed=["bias"])


@pytest.mark.parametrize(
    ("product", "more", "outputs", "row"),
    [
        (f"{PRODUCT} v = Relu(l)", "", ", float[2,5,7,8] v", (8,)),
        (PRODUCT, "", ", float[2,5,7,8] l", (8,)),
        (PRODUCT, ", float[8] bias", "", None),
        (PRODUCT, "", "", (1,)),
        (PRODUCT, "", "", (1, 8)),
        (PRODUCT, "", "", (7, 8)),
        (PRODUCT.replace("Add", "Sub"), "", "", (8,)),
        ("p = ReduceMax(x, channels) l = Add(p, bias)", "", "", (8,)),
    ],
    ids=["read twice", "given out", "fed", "number", "matrix of a row", "every column", "difference", "stretched"],
)
def test_what_is_no_bias_stays(product: str, more: str, outputs: str, row: tuple[int, ...] | None) -> None:
    weights = {"w": (8, 8), "channels": np.array([3]), **({} if row is None else {"bias": row})}
    found = rewritten(f"{product} {SUM} {NORM}", f"float[2,5,7,8] z{more}", f"float[2,5,7,8] y{outputs}", weights)
    assert found.sites == 1
    assert {"Add", "Sub"} & set(found.ops())
    assert len(found.node("SkipGroupNorm").input) == 4
    found.assert_same()
