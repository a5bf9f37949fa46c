"""1×1 convolutions as products, in front of what takes their bias along."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.trexport.graph.passes.small import Rewritten, Run, Weights, rewrite
from trexport.graph.passes.group_norm import group_norm
from trexport.graph.passes.layer_norm import layer_norm
from trexport.graph.passes.nhwc_conv import nhwc_conv
from trexport.graph.passes.pointwise import pointwise
from trexport.graph.passes.skip_group_norm import skip_group_norm
from trexport.graph.passes.transposes import transposes

CONV = "p = Conv<kernel_shape = [1,1]>(a, w, b)"
# images are channels last outside, so that no transpose is left inside
START = "a = Transpose<perm = [0,3,1,2]>(x) r = Transpose<perm = [0,3,1,2]>(z)"
GROUP_NORM = """n = GroupNormalization<num_groups = 4, epsilon = 0.01>(s, gamma, beta)
  last = Transpose<perm = [0,2,3,1]>(n) y = Relu(last)"""
VIEW = "l = Transpose<perm = [0,2,3,1]>(p) t = Reshape(l, shape)"
LAYER_NORM = "y = LayerNormalization<epsilon = 0.01>(t, gamma, beta)"
IMAGE = f"s = Add(p, r) {GROUP_NORM}"
TOKENS = f"{VIEW} {LAYER_NORM}"

PRODUCT = ["Squeeze", "Transpose", "MatMul", "Add"]
AS_IMAGE = sorted([*PRODUCT, "Add", "GroupNorm", "Relu"])
AS_TOKENS = sorted([*PRODUCT, "Reshape", "LayerNormalization"])

both = pytest.mark.parametrize(
    ("behind", "y", "expected"),
    [(IMAGE, "2,5,7,8", AS_IMAGE), (TOKENS, "2,35,8", AS_TOKENS)],
    ids=["image", "tokens"],
)


def passes(model: ir.Model) -> int:
    group_norm(model)
    nhwc_conv(model)
    transposes(model)
    return pointwise(model)


def rewritten(
    behind: str,
    y: str = "2,5,7,8",
    weights: Weights | None = None,
    *,
    conv: str = CONV,
    x: str = "2,5,7,6",
    z: str = "2,5,7,8",
    more: str = "",
    outputs: str = "",
    known: str = "",
    half: bool = False,
    run: Run = passes,
) -> Rewritten:
    """A convolution `p` of the image `x`, and what is behind it, with a residual `z`."""
    given: Weights = {"w": (8, 6, 1, 1), "b": (8,), "gamma": (8,), "beta": (8,), "shape": np.array([0, 35, 8])}
    body = f"{START} {conv} {behind}"
    text = f"(float[{x}] x, float[{z}] z{more}) => (float[{y}] y{outputs}) <{known}> {{ {body} }}"
    used = {name: value for name, value in {**given, **(weights or {})}.items() if name in body}
    return rewrite(text.replace("float[", "float16[") if half else text, run, used, opset=21, half=half)


def operators(found: Rewritten) -> list[str]:
    return sorted(op for op in found.ops() if op != "Cast")


def assert_stays(found: Rewritten) -> None:
    assert (found.sites, "MatMul" in found.ops()) == (0, False)
    assert found.node("NhwcConv")
    found.assert_same(1e-4)


@both
@pytest.mark.parametrize("half", [False, True])
def test_a_convolution(behind: str, y: str, expected: list[str], half: bool) -> None:
    found = rewritten(behind, y, half=half)
    assert (found.sites, operators(found)) == (1, expected)
    found.assert_same(2e-2 if half else 1e-5)


@both
def test_a_free_batch(behind: str, y: str, expected: list[str]) -> None:
    found = rewritten(behind, y.replace("2", "N"), x="N,5,7,6", z="N,5,7,8")
    assert (found.sites, operators(found)) == (1, expected)
    found.assert_same()


def test_an_image_of_free_sizes() -> None:
    known = "float[N,8,H,W] p, float[N,8,H,W] s"
    found = rewritten(IMAGE, "N,H,W,8", x="N,H,W,6", z="N,H,W,8", known=known)
    assert (found.sites, operators(found)) == (1, AS_IMAGE)
    found.assert_same()


def test_a_free_number_of_tokens_stays() -> None:
    """Its bias would be a kernel of its own: `layer_norm` takes fixed ones only."""
    assert_stays(rewritten(TOKENS, "2,T,8", {"shape": np.array([0, -1, 8])}, x="2,H,W,6"))


@both
@pytest.mark.parametrize(
    "how", ["pads = [0,0,0,0]", "strides = [1,1]", "group = 1", "dilations = [2,3]", 'auto_pad = "SAME_UPPER"']
)
def test_attributes_that_change_nothing(behind: str, y: str, expected: list[str], how: str) -> None:
    found = rewritten(behind, y, conv=CONV.replace("<", f"<{how}, "))
    assert (found.sites, operators(found)) == (1, expected)
    found.assert_same()


def test_the_other_way_round() -> None:
    found = rewritten(IMAGE.replace("p, r", "r, p"))
    assert (found.sites, operators(found)) == (1, AS_IMAGE)
    found.assert_same()


def test_a_row_for_each_sample() -> None:
    axes = {"axes": np.array([2, 3])}
    found = rewritten(f"u = Unsqueeze(e, axes) s = Add(p, u) {GROUP_NORM}", weights=axes, more=", float[2,8] e")
    assert (found.sites, operators(found)) == (1, sorted([*AS_IMAGE, "Unsqueeze"]))
    found.assert_same()


def test_two_convolutions_of_one_sum() -> None:
    second = "q = Conv<kernel_shape = [1,1]>(a, w2, b2)"
    found = rewritten(f"{second} s = Add(p, q) {GROUP_NORM}", weights={"w2": (8, 6, 1, 1), "b2": (8,)})
    assert (found.sites, operators(found)) == (2, sorted([*AS_IMAGE, *PRODUCT]))
    found.assert_same()


@both
def test_what_comes_next_takes_the_bias(behind: str, y: str, expected: list[str]) -> None:
    def run(model: ir.Model) -> int:
        return passes(model) + 10 * (skip_group_norm(model) + layer_norm(model))

    found = rewritten(behind, y, run=run)
    assert (found.sites, "Add" in found.ops()) == (11, False)
    found.assert_same()


@pytest.mark.parametrize(
    ("behind", "y", "outputs"),
    [
        (f"{IMAGE} sl = Transpose<perm = [0,2,3,1]>(s) u = Relu(sl)", "2,5,7,8", ", float[2,5,7,8] u"),
        (f"{IMAGE} u = Relu(s)", "2,5,7,8", ", float[2,8,5,7] u, float[2,8,5,7] s"),
        (f"{TOKENS} u = Relu(t)", "2,35,8", ", float[2,35,8] u"),
        (TOKENS, "2,35,8", ", float[2,35,8] t"),
    ],
)
def test_a_sum_that_others_read(behind: str, y: str, outputs: str) -> None:
    found = rewritten(behind, y, outputs=outputs)
    assert (found.sites, "NhwcConv" in found.ops()) == (1, False)
    found.assert_same()


@both
@pytest.mark.parametrize(
    ("how", "w", "x"),
    [
        ("kernel_shape = [3,3], pads = [1,1,1,1]", (8, 6, 3, 3), "2,5,7,6"),
        ("kernel_shape = [3,1], pads = [1,0,1,0]", (8, 6, 3, 1), "2,5,7,6"),
        ("kernel_shape = [1,3], pads = [0,1,0,1]", (8, 6, 1, 3), "2,5,7,6"),
        ("kernel_shape = [3,1]", (8, 6, 3, 1), "2,7,7,6"),
        ("kernel_shape = [1,3]", (8, 6, 1, 3), "2,5,9,6"),
        ("kernel_shape = [1,1], group = 2", (8, 3, 1, 1), "2,5,7,6"),
        ("kernel_shape = [1,1], strides = [2,2]", (8, 6, 1, 1), "2,9,14,6"),
        ("kernel_shape = [1,1], strides = [1,2]", (8, 6, 1, 1), "2,5,14,6"),
        ("kernel_shape = [1,1], strides = [2,1]", (8, 6, 1, 1), "2,9,7,6"),
        ("kernel_shape = [1,1], pads = [1,1,1,1]", (8, 6, 1, 1), "2,3,5,6"),
        ("kernel_shape = [1,1], pads = [0,1,0,1]", (8, 6, 1, 1), "2,5,5,6"),
    ],
)
def test_other_convolutions_stay(
    behind: str, y: str, expected: list[str], how: str, w: tuple[int, ...], x: str
) -> None:
    assert_stays(rewritten(behind, y, {"w": w}, conv=f"p = Conv<{how}>(a, w, b)", x=x))


@pytest.mark.parametrize(
    ("behind", "y", "weights"),
    [
        (f"{VIEW} y = Relu(t)", "2,35,8", {}),
        (f"{VIEW} k = Sin(t) y = LayerNormalization(k, gamma, beta)", "2,35,8", {}),
        (TOKENS, "2,5,7,8", {"shape": np.array([0, 5, 7, 8])}),
        (TOKENS, "70,8", {"shape": np.array([70, 8])}),
        ("y = Transpose<perm = [0,2,3,1]>(p)", "2,5,7,8", {}),
        ("q = Transpose<perm = [0,2,3,1]>(p) y = Relu(q)", "2,5,7,8", {}),
        (f"s = Mul(p, r) {GROUP_NORM}", "2,5,7,8", {}),
        (f"s = Add(p, p) {GROUP_NORM}", "2,5,7,8", {}),
        (f"s = Add(p, row) {GROUP_NORM}", "2,5,7,8", {"row": (8, 1, 1)}),
        ("s = Add(p, r) last = Transpose<perm = [0,2,3,1]>(s) y = Relu(last)", "2,5,7,8", {}),
        ("q = Transpose<perm = [0,2,3,1]>(p) y = Add(q, z)", "2,5,7,8", {}),
    ],
)
def test_others_stay(behind: str, y: str, weights: Weights) -> None:
    assert_stays(rewritten(behind, y, weights))


def test_an_image_that_is_stretched_stays() -> None:
    assert_stays(rewritten(IMAGE, z="2,5,1,8"))


@pytest.mark.parametrize(
    ("behind", "y", "outputs"),
    [
        (f"m = Mul(p, r) ml = Transpose<perm = [0,2,3,1]>(m) u = Relu(ml) {IMAGE}", "2,5,7,8", ", float[2,5,7,8] u"),
        (f"{TOKENS} u = Relu(l)", "2,35,8", ", float[2,5,7,8] u"),
    ],
)
def test_a_result_that_others_read_stays(behind: str, y: str, outputs: str) -> None:
    assert_stays(rewritten(behind, y, outputs=outputs))


@pytest.mark.parametrize(
    ("shape", "width"), [([2, 20, 14], 14), ([2, 7, 40], 40), ([2, 280, 1], 1)], ids=["across", "several", "single"]
)
def test_tokens_that_are_no_pixels_stay(shape: list[int], width: int) -> None:
    weights = {"shape": np.array(shape), "gamma": (width,), "beta": (width,)}
    assert_stays(rewritten(TOKENS, ",".join(map(str, shape)), weights))


@pytest.mark.parametrize(
    ("behind", "y", "w"),
    [
        (IMAGE, "2,5,7,8", (8, 1, 1, 1)),
        (TOKENS, "2,35,8", (8, 1, 1, 1)),
        (TOKENS, "2,35,1", (1, 6, 1, 1)),
    ],
    ids=["one channel to an image", "one channel to tokens", "tokens of one channel"],
)
def test_a_single_channel(behind: str, y: str, w: tuple[int, ...]) -> None:
    rows, columns = w[:2]
    row = {name: (rows,) for name in ("b", "gamma", "beta")}
    weights = {"w": w, "shape": np.array([0, 35, rows]), **row}
    found = rewritten(behind, y, weights, x=f"2,5,7,{columns}")
    found.assert_same()


def of_own_operators(
    conv: str = "p = com.microsoft.NhwcConv<kernel_shape = [1,1]>(x, v, b)",
    weight: str = "v = Transpose<perm = [0,2,3,1]>(w)",
    w: tuple[int, ...] = (8, 6, 1, 1),
    outputs: str = "",
) -> Rewritten:
    """As other passes could leave it."""
    norm = "<groups = 4, epsilon = 0.01, activation = 0, channels_last = 1>"
    body = f"{weight} {conv} s = Add(p, z) n = com.microsoft.GroupNorm{norm}(s, gamma, beta) y = Relu(n)"
    values = ", ".join(f"float[2,5,7,8] {name}" for name in ("p", "s", "n") if f" {name}" not in outputs)
    text = f"(float[2,5,7,6] x, float[2,5,7,8] z) => (float[2,5,7,8] y{outputs}) <{values}> {{ {body} }}"
    return rewrite(text, pointwise, {"w": w, "b": (8,), "gamma": (8,), "beta": (8,)}, checked=False)


def test_own_operators() -> None:
    found = of_own_operators()
    assert (found.sites, operators(found)) == (1, AS_IMAGE)


@pytest.mark.parametrize("name", ["p", "s"])
def test_what_is_given_out_stays(name: str) -> None:
    of_own_operators(outputs=f", float[2,5,7,8] {name}").assert_untouched()


@pytest.mark.parametrize(
    ("weight", "w"),
    [("v = Relu(w)", (8, 1, 1, 6)), ("v = Transpose<perm = [0,1,3,2]>(w)", (8, 1, 6, 1))],
    ids=["at hand", "of another layout"],
)
def test_other_weights_stay(weight: str, w: tuple[int, ...]) -> None:
    of_own_operators(weight=weight, w=w).assert_untouched()


def test_no_bias_stays() -> None:
    conv = "p = com.microsoft.NhwcConv<kernel_shape = [1,1]>(x, v)"
    of_own_operators(conv=conv).assert_untouched()
