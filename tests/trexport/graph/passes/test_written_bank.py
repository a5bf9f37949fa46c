"""A bank with whole changes in the place of cores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.helpers import IN, OUT, adapter_of, trained, weight_oracle
from tests.trexport.contrib import evaluated
from tests.trexport.graph.ops.helpers import RING
from tests.trexport.graph.passes.small import Rewritten, computed, rewrite
from tests.trexport.graph.passes.test_written import LOW_RANK, A, B, W, start
from trexport.graph.ops import DOMAIN
from trexport.graph.ops.plan import LayerPlan
from trexport.graph.ops.slots import banked, slots_for
from trexport.graph.passes.factor import factor
from trexport.graph.passes.written_bank import change_name, written_bank
from trlora import LayerAdapter

PLACES = 3


def adapters() -> list[dict[str, LayerAdapter]]:
    """Two, of three places."""
    return [{path: trained(adapter_of(RING, LOW_RANK, seed + ord(path)), seed) for path in "ab"} for seed in (1, 2)]


def rewritten(body: str, x: str, *, half: bool = False) -> tuple[Rewritten, onnx.ModelProto, dict[str, Tensor]]:
    """From the graph without an adapter to the written bank; the bank between them, and its stacks of cores."""
    own = [{path: layer for path, layer in each.items() if f"{path}.weight" in body} for each in adapters()]
    (slot,) = slots_for(own[:1])
    tensors = [slot.tensors(each, 1.0, "test") for each in own]
    cores = banked(slot, tensors, PLACES)
    plan = {path: LayerPlan("activations", 10, {}) for path in slot.layers}
    between: list[onnx.ModelProto] = []

    def run(model: ir.Model) -> int:
        factor(model, [slot], cores, plan, "fp16" if half else "fp32", PLACES)
        between.append(ir.serde.serialize_model(model))
        assert written_bank(model, list(cores), PLACES) is model
        return 0

    text, weights = start(body, x, half)
    found = rewrite(text, run, weights, half=half)
    return found, between[0], cores


def changes(paths: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Place 0 zero, two adapters, and a place that nobody has filled."""
    stacks = {}
    for path in paths:
        moved = [torch.from_numpy(weight_oracle(W[path], [(each[path], 1.0)])) - W[path] for each in adapters()]
        nothing = torch.zeros(OUT, IN)
        stack = torch.stack([nothing, *moved, nothing])
        stacks[change_name(path)] = stack.transpose(1, 2).contiguous().to(dtype)
    return stacks


@pytest.mark.parametrize("x", ["5", "N", "4,5", "N,T"])
@pytest.mark.parametrize("half", [False, True])
def test_each_sample_its_own(x: str, half: bool) -> None:
    free = x.startswith("N")
    size = 3 if free else int(x[0])
    found, bank, _ = rewritten(f"{A} {B} y = Mul(h, k)", x, half=half)
    dtype, tolerance = (torch.float16, 2e-2) if half else (torch.float32, 1e-5)
    feeds = {"x": torch.randn(size, *([3 if free else 5] if "," in x else []), IN).to(dtype)}
    chosen = {
        "adapter_index": torch.tensor([2, 0, 1, 2, 1][:size]),
        "adapter_strength": torch.tensor([0.7, 5.0, -1.2, 1.0, 0.0][:size]),
    }
    (expected,) = computed(bank, feeds | chosen)
    given = feeds | chosen | changes("ab", dtype)
    onnx.checker.check_model(found.after, full_check=True)
    scale = np.abs(expected.astype(np.float64)).max()
    for (result,) in (computed(found.after, given), [t.numpy() for t in evaluated(found.after, given)]):
        assert result.dtype == expected.dtype
        assert np.abs(result.astype(np.float64) - expected).max() <= tolerance * scale
    none = dict(chosen, adapter_index=torch.zeros(size, dtype=torch.int64))
    (plain,) = computed(found.after, given | none)
    np.testing.assert_allclose(plain, computed(found.before, feeds)[0], rtol=1e-2 if half else 1e-5, atol=1e-5)
    assert np.abs(plain.astype(np.float64) - expected).max() > 0.1 * scale


def test_inputs() -> None:
    found, _, cores = rewritten(f"{A} {B} y = Mul(h, k)", "4,5")
    inputs = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in found.after.graph.input}
    assert list(inputs) == ["x", "adapter_index", "adapter_strength", "a.change", "b.change"]
    assert inputs["a.change"] == [PLACES + 1, IN, OUT]
    held = {tensor.name for tensor in found.after.graph.initializer}
    assert not held & cores.keys()
    assert {"a.weight", "b.weight", "a.bias"} <= held
    assert not found.after.functions
    assert DOMAIN not in {opset.domain for opset in found.after.opset_import}
    assert found.ops().count("Gather") == found.ops().count("MatMul") == 2


def test_a_layer_that_is_no_bank_is_refused() -> None:
    (slot,) = slots_for([{"b": adapters()[0]["b"]}])

    def run(model: ir.Model) -> int:
        factor(model, [slot], slot.neutral(), {"b": LayerPlan("activations", 10, {})}, "fp32")
        with pytest.raises(ValueError, match="AdaptedLinear"):
            written_bank(model, list(slot.neutral()), PLACES)
        return 0

    text = f"(float[2,{IN}] x) => (float[2,{OUT}] y) {{ {B.replace('k =', 'y =')} }}"
    rewrite(text, run, {"b.weight": W["b"].numpy()})
