"""A bank with a weight for every sample in the place of cores."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.helpers import IN, OUT
from tests.trexport.contrib import evaluated
from tests.trexport.graph.passes.small import Rewritten, computed, rewrite
from tests.trexport.graph.passes.test_written import A, B, start
from tests.trexport.graph.passes.test_written_bank import adapters
from trexport.graph.ops import DOMAIN
from trexport.graph.ops.plan import LayerPlan
from trexport.graph.ops.slots import banked, slots_for
from trexport.graph.passes.factor import factor
from trexport.graph.passes.written_samples import samples_name, written_samples

BATCH, PLACES = 4, 3


def rewritten(x: str, *, half: bool = False) -> Rewritten:
    (slot,) = slots_for(adapters()[:1])
    cores = banked(slot, [], PLACES)
    plan = {path: LayerPlan("activations", 10, {}) for path in slot.layers}

    def run(model: ir.Model) -> int:
        factor(model, [slot], cores, plan, "fp16" if half else "fp32", PLACES)
        assert written_samples(model, list(cores), BATCH) is model
        return 0

    text, weights = start(f"{A} {B} y = Mul(h, k)", x, half)
    return rewrite(text, run, weights, half=half)


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["a row a sample", "tokens"])
@pytest.mark.parametrize("half", [False, True])
def test_each_sample_has_its_weights(tokens: tuple[int, ...], half: bool) -> None:
    found = rewritten(",".join(map(str, (BATCH, *tokens))), half=half)
    dtype, tolerance = (torch.float16, 1e-2) if half else (torch.float32, 1e-5)
    x = torch.randn(BATCH, *tokens, IN).to(dtype)
    weights = {path: torch.randn(BATCH, OUT, IN).to(dtype) for path in "ab"}
    (bias,) = (onnx.numpy_helper.to_array(t) for t in found.after.graph.initializer if t.name == "a.bias")
    expected = np.stack(
        [
            (x[row].double().numpy() @ weights["a"][row].double().numpy().T + bias.astype(np.float64))
            * (x[row].double().numpy() @ weights["b"][row].double().numpy().T)
            for row in range(BATCH)
        ]
    )
    feeds = {"x": x} | {samples_name(path): stack for path, stack in weights.items()}
    feeds |= {"adapter_index": torch.tensor([9, -9, 0, 1]), "adapter_strength": torch.full((BATCH,), torch.nan)}
    onnx.checker.check_model(found.after, full_check=True)
    for (result,) in (computed(found.after, feeds), [t.numpy() for t in evaluated(found.after, feeds)]):
        assert result.dtype == x.numpy().dtype
        assert np.abs(result.astype(np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def test_inputs() -> None:
    found = rewritten(f"{BATCH},5")
    inputs = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in found.after.graph.input}
    assert list(inputs) == ["x", "adapter_index", "adapter_strength", "a.samples", "b.samples"]
    assert inputs["a.samples"] == [BATCH, OUT, IN]
    assert {tensor.name for tensor in found.after.graph.initializer} == {"a.bias"}
    assert not found.after.functions
    assert DOMAIN not in {opset.domain for opset in found.after.opset_import}
    assert sorted(found.ops()) == ["Add", "MatMul", "MatMul", "Mul", "Transpose", "Transpose"]
