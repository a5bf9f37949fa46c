"""The operator that merges adapters into a weight, against the formula, in two runtimes that are not ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.helpers import IN, OUT, RESIDUALS, TRANSFORMS, Member, adapter_of, bits, trained, weight_oracle
from tests.trexport.graph.ops.helpers import (
    OPSET,
    RING,
    far,
    lower,
    model_of_function,
    run,
    slot_of,
    stack,
    stack_shapes,
    three_adapters,
)
from trexport.graph.ops.slots import LayerSlot
from trexport.graph.ops.weight import WeightSignature, weight_function
from trexport.io_spec import Dtype
from trlora import LayerAdapter

STRENGTHS = [0.7, -1.3, 0.4]
ONNX_TYPES: dict[Dtype, ir.DataType] = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}


def model_of(slot: LayerSlot, dtype: Dtype = "fp32") -> onnx.ModelProto:
    signature = WeightSignature(slot, (OUT, IN), dtype)
    function = weight_function(signature, signature.name(), OPSET)
    shapes = {"W": (OUT, IN), "strength": ("adapters",), **stack_shapes(slot)}
    kinds = {"W": ONNX_TYPES[dtype], "Y": ONNX_TYPES[dtype]}
    return model_of_function(function, shapes, (OUT, IN), kinds)


def weight_of() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))


def check(adapters: Sequence[LayerAdapter], counts: Sequence[int] = (1, 3)) -> None:
    """One model, fed the first adapters, as many as each of `counts`."""
    slot, weight = slot_of(adapters), weight_of()
    proto = model_of(slot)
    for count in counts:
        given, strengths = adapters[:count], STRENGTHS[:count]
        feeds = {"W": weight, "strength": torch.tensor(strengths), **stack(slot, given)}
        expected = weight_oracle(weight, list(zip(given, strengths, strict=True)))
        assert far(weight, expected) > 1e-2
        for found in run(proto, feeds):
            assert far(found, expected) <= 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_every_transform_of_one_and_of_three_adapters(transform: Member) -> None:
    check(three_adapters(transform, RESIDUALS[1]))


@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
def test_every_residual_of_one_and_of_three_adapters(residual: Member) -> None:
    check(three_adapters(RING, residual))


def test_a_transform_alone_and_a_residual_alone() -> None:
    check(three_adapters(RING, None))
    check(three_adapters(None, RESIDUALS[-1]))


def test_what_one_adapter_lacks_is_neutral_beside_another() -> None:
    check([trained(adapter_of(RING, None), 1), trained(adapter_of(None, RESIDUALS[2]), 2)], counts=(1, 2))


def test_residuals_of_different_types_are_summed() -> None:
    pairs = [(RING, RESIDUALS[5]), (lower(RING), RESIDUALS[2]), (None, RESIDUALS[4])]
    check([trained(adapter_of(t, r), seed) for seed, (t, r) in enumerate(pairs)], counts=(1, 2, 3))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("residual", [RESIDUALS[1], RESIDUALS[-1]], ids=str)
def test_at_strength_zero_and_with_neutral_tensors_it_is_the_weight_to_the_bit(
    transform: Member, residual: Member
) -> None:
    adapters = three_adapters(transform, residual)
    slot, weight = slot_of(adapters), weight_of()
    proto = model_of(slot)
    neutral = {name.replace(".", "_"): tensor[None] for name, tensor in slot.neutral().items()}
    for given in (
        {"strength": torch.zeros(3), **stack(slot, adapters)},
        {"strength": torch.tensor([0.7]), **neutral},
    ):
        for found in run(proto, {"W": weight, **given}):
            assert bits(found) == bits(weight)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.type != "identity"], ids=str)
def test_a_half_precision_weight_is_computed_in_float32_and_rounded_once(transform: Member) -> None:
    adapters = three_adapters(transform, RESIDUALS[2])
    slot, weight = slot_of(adapters), weight_of().half()
    expected = weight_oracle(weight, list(zip(adapters, STRENGTHS, strict=True)))
    half_a_step = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64) / 2
    feeds = {"W": weight, "strength": torch.tensor(STRENGTHS), **stack(slot, adapters)}
    for found in run(model_of(slot, "fp16"), feeds):
        assert found.dtype == torch.float16
        # float32's own error, which grows with the terms and not with their sum
        slack = 1e-5 * np.abs(expected).max()
        assert (np.abs(found.double().numpy() - expected) <= half_a_step * 1.001 + slack).all()
    plain = {**feeds, "strength": torch.zeros(3)}
    for found in run(model_of(slot, "fp16"), plain):
        assert bits(found) == bits(weight)


def test_a_change_that_half_precision_would_lose_is_kept() -> None:
    """W = 2048 and changes of 1: two of them make a step of half precision, each alone rounds away."""
    adapters = [adapter_of(None, Member({"type": "low_rank", "rank": 1, "alpha": None})) for _ in range(2)]
    slot = LayerSlot.of(adapters[0])
    feeds = {
        "W": torch.full((OUT, IN), 2048.0).half(),
        "strength": torch.ones(2),
        "residual_lora_A_weight": torch.ones(2, 1, IN),
        "residual_lora_B_weight": torch.ones(2, OUT, 1),
    }
    for found in run(model_of(slot, "fp16"), feeds):
        assert bits(found) == bits(torch.full((OUT, IN), 2050.0).half())
