"""Group normalisation as one node of ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from tests.trexport.graph.passes.small import Rewritten, attributes, rewrite
from trexport.graph.passes.group_norm import group_norm

ROWS = "gu = Unsqueeze(gamma, rows) br = Unsqueeze(beta, rows)"
WRITTEN = f"""
  v = Reshape(x, groups) n = InstanceNormalization<epsilon = 0.001>(v, ones, zeros) r = Reshape(n, shape)
  {ROWS} gl = CastLike(gu, r) m = Mul(r, gl) bl = CastLike(br, m) o = Add(m, bl)
"""
SILU = "s = Sigmoid(o) y = Mul(o, s)"


def written(
    body: str, channels: int = 12, groups: int = 3, changed: Mapping[str, np.ndarray] | None = None
) -> Rewritten:
    sizes = f"float[2,{channels},5,7]"
    given = {
        "groups": np.array([0, groups, -1]),
        "shape": np.array([2, channels, 5, 7]),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
        "rows": np.array([1, 2]),
    } | dict(changed or {})
    text = f"({sizes} x) => ({sizes} y) {{ {body} }}"
    return rewrite(text, group_norm, {**given, "gamma": (channels,), "beta": (channels,)})


@pytest.mark.parametrize(("end", "activation"), [("y = Identity(o)", 0), (SILU, 1)])
def test_as_the_exporter_writes_it(end: str, activation: int) -> None:
    found = written(WRITTEN + end)
    assert found.sites == 1
    assert [op for op in found.ops() if op != "Identity"] == ["Transpose", "GroupNorm", "Transpose"]
    expected = {"groups": 3, "activation": activation, "channels_last": 1, "epsilon": pytest.approx(0.001)}
    assert attributes(found.node("GroupNorm")) == expected
    found.assert_same()


@pytest.mark.parametrize(("end", "activation"), [("y = Identity(o)", 0), (SILU, 1)])
def test_the_operator(end: str, activation: int) -> None:
    body = f"o = GroupNormalization<num_groups = 4, epsilon = 0.01>(x, gamma, beta) {end}"
    text = f"(float[2,8,3,5] x) => (float[2,8,3,5] y) {{ {body} }}"
    found = rewrite(text, group_norm, {"gamma": (8,), "beta": (8,)}, opset=21)
    assert found.sites == 1
    assert attributes(found.node("GroupNorm"))["activation"] == activation
    found.assert_same()


def test_half_precision_takes_its_rows_in_float32() -> None:
    text = "(float16[2,8,3,5] x) => (float16[2,8,3,5] y) { y = GroupNormalization<num_groups = 4>(x, gamma, beta) }"
    rows = {n: np.random.default_rng(1).standard_normal(8).astype(np.float16) for n in ("gamma", "beta")}
    found = rewrite(text, group_norm, rows, opset=21)
    assert found.ops().count("Cast") == 2
    found.assert_same(3e-3)


def test_a_sum_that_is_read_twice_is_not_activated() -> None:
    found = written(WRITTEN + "s = Sigmoid(o) z = Mul(o, s) y = Add(z, o)")
    assert attributes(found.node("GroupNorm"))["activation"] == 0
    found.assert_same()


@pytest.mark.parametrize(("channels", "groups"), [(9, 3), (1028, 2)], ids=["odd", "wide"])
def test_what_the_kernel_does_not_take(channels: int, groups: int) -> None:
    written(WRITTEN + SILU, channels, groups).assert_untouched()


@pytest.mark.parametrize(
    "changed",
    [
        {"ones": np.array([1, 1, 2], np.float32)},
        {"zeros": np.array([0, 1, 0], np.float32)},
    ],
)
def test_a_normalisation_that_scales_its_groups(changed: dict[str, np.ndarray]) -> None:
    written(WRITTEN + SILU, changed=changed).assert_untouched()


def test_up_to_opset_20_the_operator_scales_groups() -> None:
    """A meaning that ONNX has withdrawn."""
    text = "(float[2,8,3,5] x) => (float[2,8,3,5] y) { y = GroupNormalization<num_groups = 4>(x, gamma, beta) }"
    rewrite(text, group_norm, {"gamma": (4,), "beta": (4,)}, opset=18, checked=False).assert_untouched()
