"""Products with weights that are fed, in the place of operators with cores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from tests.helpers import IN, MAGNITUDES, OUT, OUTPUT_TRANSFORMS, RESIDUALS, Member, adapter_of, trained, weight_oracle
from tests.trexport.contrib import evaluated
from tests.trexport.graph.ops.helpers import RING
from tests.trexport.graph.passes.small import Rewritten, computed, rewrite
from trexport.graph.ops import DOMAIN
from trexport.graph.ops.plan import PATHS, LayerPlan, Path
from trexport.graph.ops.slots import Slot, banked, slots_for
from trexport.graph.passes.factor import factor
from trexport.graph.passes.written import written
from trlora import LayerAdapter

Adapters = Sequence[Mapping[str, LayerAdapter]]

LOW_RANK = RESIDUALS[1]
W = {path: 0.1 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(ord(path))) for path in "ab"}
A = 't = Transpose<perm = [1,0]>("a.weight") p = MatMul(x, t) h = Add(p, "a.bias")'
B = 'u = Transpose<perm = [1,0]>("b.weight") k = MatMul(x, u)'
GEMM = 'h = Gemm<transB = 1>(x, "a.weight", "a.bias")'


def ring(seed: int) -> LayerAdapter:
    return trained(adapter_of(RING, LOW_RANK, seed), seed)


def start(body: str, x: str, half: bool, more: str = "") -> tuple[str, dict[str, np.ndarray | tuple[int, ...]]]:
    """The graph without an adapter, and its weights."""
    text = f"(float[{x},{IN}] x{more}) => (float[{x},{OUT}] y) {{ {body} }}"
    kind = np.float16 if half else np.float32
    weights: dict[str, np.ndarray | tuple[int, ...]] = {
        f"{name}.weight": weight.numpy().astype(kind) for name, weight in W.items() if f"{name}.weight" in body
    }
    bias: dict[str, tuple[int, ...]] = {"a.bias": (OUT,)} if "a.bias" in body else {}
    return text.replace("float[", "float16[") if half else text, weights | bias


def rewritten(
    body: str, adapters: Adapters, *, path: Path = "activations", x: str = "2,5", half: bool = False, more: str = ""
) -> tuple[Rewritten, onnx.ModelProto, list[Slot]]:
    """From the graph without an adapter to the written one, and the factored one between them, whose cores are neutral."""
    slots = slots_for(adapters)
    neutral = {name: tensor for slot in slots for name, tensor in slot.neutral().items()}
    plan = {name: LayerPlan(path, 10, {}) for slot in slots for name in slot.layers}
    between: list[onnx.ModelProto] = []

    def run(model: ir.Model) -> int:
        factor(model, slots, neutral, plan, "fp16" if half else "fp32")
        between.append(ir.serde.serialize_model(model))
        assert written(model, list(neutral)) is model
        return 0

    text, weights = start(body, x, half, more)
    found = rewrite(text, run, weights, half=half)
    (factored,) = between
    return found, factored, slots


def assert_adapts(
    found: Rewritten,
    factored: onnx.ModelProto,
    slots: Sequence[Slot],
    adapters: Adapters,
    strengths: Sequence[float],
    tolerance: float = 1e-5,
) -> None:
    """With adapted weights it computes what the factored graph does with cores."""
    feeds = found.feeds()
    cores = {}
    for slot, adapter, strength in zip(slots, adapters, strengths, strict=True):
        cores |= slot.tensors(adapter, strength, "test")
    fed = {}
    for name in dict.fromkeys(name for slot in slots for name in slot.layers):
        on_layer = [(a[name], s) for a, s in zip(adapters, strengths, strict=True) if name in a]
        fed[f"{name}.weight"] = torch.from_numpy(weight_oracle(W[name], on_layer)).to(feeds["x"].dtype)
    (expected,) = computed(factored, feeds | cores)
    (plain,) = computed(factored, feeds)
    scale = np.abs(expected).max()
    assert np.abs(expected.astype(np.float64) - plain).max() > 0.1 * scale
    for (result,) in (computed(found.after, feeds | fed), [t.numpy() for t in evaluated(found.after, feeds | fed)]):
        assert result.dtype == expected.dtype
        assert np.abs(result.astype(np.float64) - expected).max() <= tolerance * scale


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("x", ["5", "2,5", "N,T"])
@pytest.mark.parametrize("half", [False, True])
def test_layers_with_and_without_a_bias(path: Path, x: str, half: bool) -> None:
    adapters = [{"a": ring(1), "b": ring(2)}]
    found, factored, slots = rewritten(f"{A} {B} y = Mul(h, k)", adapters, path=path, x=x, half=half)
    assert sorted(found.ops()) == ["Add", "MatMul", "MatMul", "Mul", "Transpose", "Transpose"]
    found.assert_same(1e-2 if half else 1e-5, kernels=True)
    assert_adapts(found, factored, slots, adapters, [0.7], 1e-2 if half else 1e-5)


def test_a_product_that_adds_its_bias_itself() -> None:
    adapters = [{"a": ring(1)}]
    found, factored, slots = rewritten(f"{GEMM} y = Relu(h)", adapters, x="5")
    assert found.ops() == ["Transpose", "MatMul", "Add", "Relu"]
    found.assert_same(kernels=True)
    assert_adapts(found, factored, slots, adapters, [0.7])


@pytest.mark.parametrize("body", [A.replace("h =", "y ="), B.replace("k =", "y =")], ids=["bias", "no bias"])
def test_a_layer_that_is_the_output(body: str) -> None:
    adapters = [{body[body.index('"') + 1]: ring(1)}]
    found, factored, slots = rewritten(body, adapters)
    found.assert_same(kernels=True)
    assert_adapts(found, factored, slots, adapters, [0.7])


def test_several_adapters() -> None:
    """The second on one layer only."""
    adapters = [{"a": ring(1), "b": ring(2)}, {"b": ring(3)}]
    found, factored, slots = rewritten(f"{A} {B} y = Mul(h, k)", adapters)
    found.assert_same(kernels=True)
    assert_adapts(found, factored, slots, adapters, [0.4, -0.9])


@pytest.mark.parametrize(
    ("magnitude", "turn"),
    [(MAGNITUDES[1], None), (MAGNITUDES[2], None), (None, OUTPUT_TRANSFORMS[1])],
    ids=["norm", "scale", "transform of outputs"],
)
def test_what_stands_outside_of_the_product(magnitude: Member | None, turn: Member | None) -> None:
    adapter = trained(adapter_of(RING, LOW_RANK, 0, magnitude, W["a"], turn))
    found, factored, slots = rewritten(f"{A} y = Relu(h)", [{"a": adapter}], path="weight")
    assert found.ops() == ["Transpose", "MatMul", "Add", "Relu"]
    assert_adapts(found, factored, slots, [{"a": adapter}], [0.7])


def test_inputs_and_weights() -> None:
    adapters = [{"a": ring(1), "b": ring(2)}, {"b": ring(3)}]
    found, _, _ = rewritten(f"{A} {B} y = Mul(h, k)", adapters)
    after = found.after
    assert [value.name for value in after.graph.input] == ["x", "a.weight", "b.weight"]
    assert [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in after.graph.input[1:]] == 2 * [[OUT, IN]]

    def held(model: onnx.ModelProto) -> dict[str, bytes]:
        return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}

    assert held(after) == held(found.before)
    assert not after.functions
    assert DOMAIN not in {opset.domain for opset in after.opset_import}


def test_other_layers_and_other_inputs_with_a_value_stay() -> None:
    text = f'{A} {B} m = Mul(k, "a.bias") y = Mul(h, m)'
    adapters = [{"b": ring(2)}]
    found, factored, slots = rewritten(text, adapters, more=f', float[{OUT}] "a.bias"')
    assert [value.name for value in found.after.graph.input] == ["x", "a.bias", "b.weight"]
    found.assert_same(kernels=True)
    found.assert_same(fed=["a.bias"], kernels=True)
    assert_adapts(found, factored, slots, adapters, [0.7])


def test_no_adapted_layer() -> None:
    found = rewrite("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }", lambda model: len(written(model, []).graph))
    assert (found.sites, found.ops()) == (1, ["Relu"])
    found.assert_same()


GEOMETRIES = {
    "1x1": ("kernel_shape = [1,1]", (1, 1)),
    "strided": ("kernel_shape = [3,1], pads = [1,0,1,0], strides = [2,1]", (3, 1)),
    "of groups, dilated": ("kernel_shape = [1,3], pads = [0,2,0,2], dilations = [1,2], group = 2", (1, 3)),
}


@pytest.mark.parametrize("path", ["activations", "weight"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions(path: Path, bias: bool, geometry: str) -> None:
    attributes, kernel = GEOMETRIES[geometry]
    groups = 2 if "group" in attributes else 1
    columns = IN // math.prod(kernel)
    shape = (OUT, columns, *kernel)
    adapter = trained(adapter_of(None, LOW_RANK, 5), 5)
    (slot,) = slots_for([{"b": adapter}])
    between: list[onnx.ModelProto] = []

    def run(model: ir.Model) -> int:
        factor(model, [slot], slot.neutral(), {"b": LayerPlan(path, 10, {})}, "fp32")
        between.append(ir.serde.serialize_model(model))
        written(model, list(slot.neutral()))
        return 0

    io = f"(float[2,{columns * groups},5,7] x) => (float[2,{OUT},N,M] y)"
    text = f'{io} {{ c = Conv<{attributes}>(x, "b.weight"BIAS) y = Relu(c) }}'
    given: dict[str, tuple[int, ...]] = {"b.weight": shape, **({"b.bias": (OUT,)} if bias else {})}
    found = rewrite(text.replace("BIAS", ', "b.bias"' if bias else ""), run, given)
    assert found.ops() == ["Conv", "Relu"]
    assert len(found.node("Conv").input) == 2 + bias
    found.assert_same(kernels=True)
    feeds = found.feeds()
    held = {t.name: numpy_helper.to_array(t) for t in found.before.graph.initializer}
    weight = torch.from_numpy(held["b.weight"].copy())
    new = torch.from_numpy(weight_oracle(weight.flatten(1), [(adapter, 0.7)])).reshape(shape)
    (expected,) = computed(between[0], feeds | slot.tensors({"b": adapter}, 0.7, "test"))
    (result,) = computed(found.after, feeds | {"b.weight": new.float()})
    np.testing.assert_allclose(result, expected, atol=1e-4)
    (plain,) = computed(found.after, feeds)
    assert np.abs(plain - expected).max() > 1e-2


def test_a_bank_has_no_one_weight() -> None:
    (slot,) = slots_for([{"b": trained(adapter_of(None, LOW_RANK))}])
    cores = banked(slot, [], 2)

    def run(model: ir.Model) -> int:
        factor(model, [slot], cores, {"b": LayerPlan("activations", 10, {})}, "fp32", 2)
        with pytest.raises(ValueError, match="BankedLinear"):
            written(model, list(cores))
        return 0

    text = f'(float[2,{IN}] x) => (float[2,{OUT}] y) {{ t = Transpose<perm = [1,0]>("b.weight") y = MatMul(x, t) }}'
    rewrite(text, run, {"b.weight": (OUT, IN)})
