from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trlora import AdaptedLinear, AdapterSpec, LayerAdapter, ShapeError
from trlora.residuals import LowRankResidual, LowRankResidualSpec


@pytest.mark.parametrize(
    ("inputs", "outputs", "rank", "alpha"), [(15, 7, 4, 4), (7, 28, 3, 8), (45, 28, 5, 2.5), (3, 5, 1, 1)]
)
def test_pefts_lora_has_the_same_outputs_and_the_same_merged_weight(
    inputs: int, outputs: int, rank: int, alpha: float
) -> None:
    base = nn.Linear(inputs, outputs, dtype=torch.float64)
    layer = AdaptedLinear(nn.Linear(inputs, outputs, dtype=torch.float64))
    layer.base.load_state_dict(base.state_dict())
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)  # type: ignore[arg-type]
    peft = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    trained = {name: tensor for name, tensor in peft.state_dict().items() if "lora_" in name}
    a, b = (next(tensor for name, tensor in trained.items() if f"lora_{part}" in name) for part in "AB")

    spec = AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": rank, "alpha": alpha}})
    tensors = {"lora_A.weight": a.clone(), "lora_B.weight": b.clone()}
    residual = spec.residual.from_tensors(tensors)
    layer.add("lora", LayerAdapter.from_parts(spec, None, residual, inputs, outputs))
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    expected = peft(x)
    assert not torch.allclose(expected, layer.base(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    merged = peft.merge_and_unload()[0].weight  # type: ignore[operator]
    torch.testing.assert_close(layer.merged_weight(torch.float64), merged, rtol=1e-12, atol=1e-12)


def test_alpha_scales_and_null_means_one() -> None:
    a, b = torch.randn(4, 15), torch.randn(28, 4)
    torch.testing.assert_close(LowRankResidual(a, b, 4).delta(), b @ a)
    torch.testing.assert_close(LowRankResidual(a, b, 10).delta(), 2.5 * (b @ a))
    plain = LowRankResidualSpec(4, None).from_tensors({"lora_A.weight": a, "lora_B.weight": b})
    torch.testing.assert_close(plain.delta(), b @ a)


def test_the_start_is_pefts() -> None:
    """A uniform within 1/√in, B zero."""
    residual = LowRankResidualSpec(64).build(400, 28, torch.Generator().manual_seed(0))
    a, b = residual.lora_A.weight, residual.lora_B.weight
    assert a.shape == (64, 400)
    assert not b.any()
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    torch.manual_seed(0)
    again = LowRankResidualSpec(64).build(400, 28, torch.Generator().manual_seed(0))
    assert torch.equal(again.lora_A.weight, a)


def test_factors_that_do_not_meet_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(4, 15\).*\(28, 3\)"):
        LowRankResidual(torch.zeros(4, 15), torch.zeros(28, 3), 4)
