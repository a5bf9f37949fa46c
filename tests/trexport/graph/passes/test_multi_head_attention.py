"""Attention as one node of ONNX Runtime's, which it runs on the CPU too."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from tests.trexport.graph.passes.small import Rewritten, attributes, rewrite
from trexport.graph.passes.multi_head_attention import multi_head_attention

# (batch 2, tokens 5 and 7, 3 heads of width 8)
SPLIT = """
  q4 = Reshape(q, qs) qt = Transpose<perm = [0,2,1,3]>(q4)
  k4 = Reshape(k, ks) kt = Transpose<perm = [0,2,1,3]>(k4)
  v4 = Reshape(v, ks) vt = Transpose<perm = [0,2,1,3]>(v4)
"""
PRODUCTS = """
  km = Reshape(kt, km_s) ku = Transpose<perm = [0,2,1]>(km) kr = Reshape(ku, kr_s)
  qm = Mul(qt, root) root_l = CastLike(root, kr) kn = Mul(kr, root_l)
  s = MatMul(qm, kn) p = Softmax<axis = -1>(s) o = MatMul(p, vt)
"""
TURNED = """
  kr = Transpose<perm = [0,1,3,2]>(kt) qm = Mul(qt, root)
  s = MatMul(qm, kr) p = Softmax<axis = -1>(s) o = MatMul(p, vt)
"""
JOIN = "oj = Transpose<perm = [0,2,1,3]>(o) y = Reshape(oj, ys)"
IO = "(float[2,5,24] q, float[2,7,24] k, float[2,7,24] v) => (float[2,5,24] y)"


def rewritten(body: str, root: float, opset: int = 20, io: str = IO) -> Rewritten:
    shapes = {"qs": [2, -1, 3, 8], "ks": [2, -1, 3, 8], "km_s": [-1, 7, 8], "kr_s": [2, 3, 8, 7], "ys": [2, -1, 24]}
    given = {name: np.array(shape) for name, shape in shapes.items() if f"{name})" in body}
    given |= {"root": np.array(root, np.float32)} if "root" in body else {}
    return rewrite(f"{io} {{ {body} }}", multi_head_attention, given, opset=opset)


@pytest.mark.parametrize("body", [PRODUCTS, TURNED])
@pytest.mark.parametrize("scale", [8**-0.5, 0.7])
def test_products(body: str, scale: float) -> None:
    root = scale**0.5 if body is PRODUCTS else scale
    found = rewritten(SPLIT + body + JOIN, root)
    assert (found.sites, found.ops()) == (1, ["MultiHeadAttention"])
    node = found.node("MultiHeadAttention")
    assert (node.domain, list(node.input)) == ("com.microsoft", ["q", "k", "v"])
    assert attributes(node) == {"num_heads": 3} | ({"scale": pytest.approx(0.7)} if scale == 0.7 else {})
    found.assert_same()


@pytest.mark.parametrize("scale", ["", "<scale = 0.7>"])
def test_operator(scale: str) -> None:
    found = rewritten(SPLIT + f"o = Attention{scale}(qt, kt, vt)" + JOIN, 1.0, 23)
    assert (found.sites, found.ops()) == (1, ["MultiHeadAttention"])
    found.assert_same()


def test_onnx_runtime_computes_the_same() -> None:
    """Its own kernel, and not our understanding of it."""
    found = rewritten(SPLIT + PRODUCTS + JOIN, 0.9)
    feeds = {
        n: torch.randn(2, t, 24, generator=torch.Generator().manual_seed(t)).numpy()
        for n, t in zip("qkv", (5, 7, 7), strict=True)
    }
    after, before = (
        np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0])
        for model in (found.after, found.before)
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_a_scale_that_half_precision_has_rounded_is_the_exact_one() -> None:
    root = float(np.float16(8**-0.25))
    assert root**2 != pytest.approx(8**-0.5, rel=1e-6)
    found = rewritten(SPLIT + PRODUCTS + JOIN, root)
    assert attributes(found.node("MultiHeadAttention")) == {"num_heads": 3}


@pytest.mark.parametrize(
    "body",
    [
        SPLIT + PRODUCTS.replace("-1>(s)", "2>(s)") + JOIN,
        SPLIT + TURNED + "t = Relu(o) oj = Transpose<perm = [0,2,1,3]>(t) y = Reshape(oj, ys)",
        SPLIT + TURNED.replace("p = Softmax<axis = -1>(s)", "t = Relu(s) p = Softmax<axis = -1>(t)") + JOIN,
        SPLIT + TURNED + "y = Reshape(o, ys)",
    ],
    ids=["softmax over the queries", "something after it", "something between", "heads not brought back"],
)
def test_something_else_is_left_alone(body: str) -> None:
    rewritten(body, 0.5).assert_untouched()


@pytest.mark.parametrize("attribute", ["is_causal = 1", "softcap = 2.0"])
def test_special_attention_is_left_alone(attribute: str) -> None:
    rewritten(SPLIT + f"o = Attention<{attribute}>(qt, kt, vt)" + JOIN, 1.0, 23).assert_untouched()


def test_a_mask_is_left_alone() -> None:
    io = IO.replace("v) =>", "v, float[5,7] m) =>")
    rewritten(SPLIT + "o = Attention(qt, kt, vt, m)" + JOIN, 1.0, 23, io).assert_untouched()


def test_weights_that_are_read_are_kept() -> None:
    """Scores that something else reads have to be there: the products stay for it."""
    io = IO.replace("(float[2,5,24] y)", "(float[2,5,24] y, float[2,3,5,7] p)")
    found = rewritten(SPLIT + TURNED + JOIN, 0.5, io=io)
    assert found.sites == 1
    assert "Softmax" in found.ops()
    found.assert_same()
