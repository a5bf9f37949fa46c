"""Convolutions with their channels last."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.trexport.graph.passes.small import Weights, attributes, rewrite
from trexport.graph.passes.nhwc_conv import nhwc_conv

CONV = "kernel_shape = [3,2], pads = [1,0,1,0], strides = [2,1], dilations = [1,2]"


@pytest.mark.parametrize("group", [1, 2])
def test_convolution(group: int) -> None:
    text = f"(float[2,4,9,7] x) => (float[2,6,5,5] y) {{ y = Conv<{CONV}, group = {group}>(x, w, b) }}"
    found = rewrite(text, nhwc_conv, {"w": (6, 4 // group, 3, 2), "b": (6,)})
    assert found.sites == 1
    assert sorted(found.ops()) == ["NhwcConv", "Transpose", "Transpose", "Transpose"]
    expected = {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "strides": [2, 1], "dilations": [1, 2], "group": group}
    assert attributes(found.node("NhwcConv")) == expected
    found.assert_same()


def test_weights_stay_as_they_are() -> None:
    text = f"(float[2,4,9,7] x) => (float[2,6,5,5] y) {{ y = Conv<{CONV}>(x, w, b) }}"
    found = rewrite(text, nhwc_conv, {"w": (6, 4, 3, 2), "b": (6,)})

    def weights(model: onnx.ModelProto) -> dict[str, bytes]:
        return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}

    assert weights(found.after) == weights(found.before)
    found.assert_same()


@pytest.mark.parametrize("kernel", ["w", "d"], ids=["fed", "computed"])
def test_one_pixel_is_a_product_where_its_weight_is_no_constant(kernel: str) -> None:
    text = f"""(float[2,4,9,7] x, float[6,4,1,1] w) => (float[2,6,9,7] y) {{
        d = Mul(w, w) y = Conv<kernel_shape = [1,1], pads = [0,0,0,0]>(x, {kernel}, b)
    }}"""
    found = rewrite(text, nhwc_conv, {"w": (6, 4, 1, 1), "b": (6,)})
    assert found.sites == 1
    assert {"MatMul", "Add"} <= set(found.ops())
    assert not {"Conv", "NhwcConv"} & set(found.ops())
    found.assert_same(fed=["w"])


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("(float[1,4,5,5] x) => (float[1,6,3,3] y) { y = Conv(x, w) }", {"w": (6, 4, 3, 3)}),
        ("(float[1,4,5] x) => (float[1,6,3] y) { y = Conv(x, w, b) }", {"w": (6, 4, 3), "b": (6,)}),
        (
            "(float[1,4,5,5] x, float[6] b) => (float[1,6,3,3] y) { y = Conv(x, w, b) }",
            {"w": (6, 4, 3, 3), "b": np.ones(6, np.float32)},
        ),
        (
            "(float[1,4,5,5] x, float[6,4,3,3] w) => (float[1,6,3,3] y) { y = Conv(x, w, b) }",
            {"w": np.ones((6, 4, 3, 3), np.float32), "b": (6,)},
        ),
        (
            "(float[1,4,5,5] x, float[6,4,3,3] c) => (float[1,6,3,3] y) { d = Add(w, c) y = Conv(x, d, b) }",
            {"w": (6, 4, 3, 3), "b": (6,)},
        ),
        (
            "(float[1,4,5,5] x, float[6,4,1,1] w) => (float[1,6,3,3] y) { y = Conv<strides = [2,2]>(x, w, b) }",
            {"w": np.ones((6, 4, 1, 1), np.float32), "b": (6,)},
        ),
    ],
    ids=[
        "no bias",
        "one dimension",
        "a bias that can be fed",
        "a weight that can be fed",
        "a weight that is computed",
        "every second pixel",
    ],
)
def test_others_are_left_alone(text: str, weights: Weights) -> None:
    rewrite(text, nhwc_conv, weights).assert_untouched()
