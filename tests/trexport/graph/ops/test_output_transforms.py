"""Transforms of outputs against the formula, in every form, in two runtimes that are not ours."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.helpers import (
    IN,
    MAGNITUDES,
    OUT,
    OUTPUT_TRANSFORMS,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    bits,
    trained,
    weight_oracle,
)
from tests.trexport.graph.ops.helpers import OPSET, far, model_of_function, run, slot_of, stack, stack_shapes
from trexport.errors import ArtifactError, UsageError
from trexport.graph.ops.linear import LinearSignature, linear_function
from trexport.graph.ops.plan import CPU, plan_layer
from trexport.graph.ops.slots import LayerSlot, Slot
from trexport.graph.ops.weight import WeightSignature, weight_function
from trlora import LayerAdapter

BESIDE = [(None, None, None), (TRANSFORMS[6], RESIDUALS[5], MAGNITUDES[1])]
STRENGTHS = [0.7, -1.2]

each_member = pytest.mark.parametrize("member", OUTPUT_TRANSFORMS, ids=str)
each_beside = pytest.mark.parametrize("beside", BESIDE, ids=["alone", "with all"])


def weight_of() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9))


def adapters_of(member: Member, beside: tuple[Member | None, ...]) -> list[LayerAdapter]:
    transform, residual, magnitude = beside
    return [
        trained(adapter_of(transform, residual, seed, magnitude, weight_of(), member), seed + 3) for seed in range(2)
    ]


@each_member
@each_beside
def test_two_adapters_at_once(member: Member, beside: tuple[Member | None, ...]) -> None:
    adapters = adapters_of(member, beside)
    slots = tuple(LayerSlot.of(adapter) for adapter in adapters)
    signature = LinearSignature(slots, OUT, IN, True, 3, "weight", "fp32")
    x, bias = torch.randn(2, 3, IN), torch.randn(OUT)
    shapes = {"X": ("b", "r", IN), "W": (OUT, IN), "B": (OUT,)}
    given = {"X": x, "W": weight_of(), "B": bias}
    for number, (slot, adapter) in enumerate(zip(slots, adapters, strict=True)):
        own = stack_shapes(slot, f"_{number}")
        shapes |= {f"strength_{number}": (1,), **{name: shape[1:] for name, shape in own.items()}}
        given |= {name: tensor[0] for name, tensor in stack(slot, [adapter], f"_{number}").items()}
        given[f"strength_{number}"] = torch.tensor([STRENGTHS[number]])
    proto = model_of_function(linear_function(signature, signature.name(), OPSET), shapes, ("b", "r", OUT))
    weight = weight_oracle(weight_of(), list(zip(adapters, STRENGTHS, strict=True)))
    expected = x.double().numpy() @ weight.T + bias.double().numpy()
    for found in run(proto, given):
        assert far(found, expected) <= 1e-5


@each_member
@each_beside
def test_every_sample_with_its_own(member: Member, beside: tuple[Member | None, ...]) -> None:
    adapters = adapters_of(member, beside)
    slot, x = LayerSlot.of(adapters[0]), torch.randn(2, 3, IN)
    signature = LinearSignature((slot,), OUT, IN, False, 3, "weight", "fp32", bank=True)
    shapes = {"X": ("b", "r", IN), "W": (OUT, IN), "index": ("b",), "strength_0": ("b",)}
    proto = model_of_function(
        linear_function(signature, signature.name(), OPSET),
        {**shapes, **stack_shapes(slot, "_0")},
        ("b", "r", OUT),
        {"index": ir.DataType.INT64},
    )
    given = {"index": torch.tensor([1, 0]), "strength_0": torch.tensor(STRENGTHS), **stack(slot, adapters, "_0")}
    rows = zip(x.double().numpy(), (1, 0), STRENGTHS, strict=True)
    expected = np.stack([row @ weight_oracle(weight_of(), [(adapters[k], s)]).T for row, k, s in rows])
    for found in run(proto, {"X": x, "W": weight_of(), **given}):
        assert far(found, expected) <= 1e-5


@each_member
@each_beside
def test_several_in_one_weight(member: Member, beside: tuple[Member | None, ...]) -> None:
    adapters = adapters_of(member, beside)
    slot, weight = LayerSlot.of(adapters[0]), weight_of()
    signature = WeightSignature(slot, (OUT, IN), "fp32")
    shapes = {"W": (OUT, IN), "strength": ("adapters",), **stack_shapes(slot)}
    proto = model_of_function(weight_function(signature, signature.name(), OPSET), shapes, (OUT, IN))
    expected = weight_oracle(weight, list(zip(adapters, STRENGTHS, strict=True)))
    for found in run(proto, {"W": weight, "strength": torch.tensor(STRENGTHS), **stack(slot, adapters)}):
        assert far(found, expected) <= 1e-5
    neutral = {name.replace(".", "_"): tensor[None] for name, tensor in slot.neutral().items()}
    off = {"strength": torch.zeros(2), **stack(slot, adapters)}
    for given in (off, {"strength": torch.tensor([0.7]), **neutral}):
        for found in run(proto, {"W": weight, **given}):
            assert bits(found) == bits(weight)


def test_beside_an_adapter_of_the_inputs() -> None:
    """In one slot a transform of outputs and one of inputs: each adapter is neutral in the other's place."""
    turned = trained(adapter_of(None, None, 0, None, None, OUTPUT_TRANSFORMS[1]), 5)
    ring = trained(adapter_of(TRANSFORMS[6], RESIDUALS[1]), 6)
    slot = slot_of([turned, ring])
    signature = WeightSignature(slot, (OUT, IN), "fp32")
    shapes = {"W": (OUT, IN), "strength": ("adapters",), **stack_shapes(slot)}
    proto = model_of_function(weight_function(signature, signature.name(), OPSET), shapes, (OUT, IN))
    expected = weight_oracle(weight_of(), [(turned, 0.7), (ring, -1.2)])
    given = {"W": weight_of(), "strength": torch.tensor(STRENGTHS), **stack(slot, [turned, ring])}
    for found in run(proto, given):
        assert far(found, expected) <= 1e-5


def test_the_plan_rebuilds_the_weight_and_records_are_read_back() -> None:
    slot = LayerSlot.of(adapters_of(OUTPUT_TRANSFORMS[1], BESIDE[1])[0])
    plan = plan_layer([slot], (OUT, IN), 5, CPU)
    assert set(plan.cost_ms) == {"weight"}
    with pytest.raises(UsageError, match="--path weight"):
        plan_layer([slot], (OUT, IN), 5, CPU, "activations")
    named = Slot("", {"a": slot})
    assert Slot.from_dict(named.to_dict()) == named
    with pytest.raises(ArtifactError, match="output_transform found, the graph takes none"):
        LayerSlot.of(adapter_of(None, RESIDUALS[1])).tensors(adapters_of(OUTPUT_TRANSFORMS[1], BESIDE[0])[0])
