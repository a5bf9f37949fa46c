"""Gains against the formula, for every magnitude, in every form, in two runtimes that are not ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.helpers import (
    IN,
    MAGNITUDES,
    OUT,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    bias_oracle,
    bits,
    trained,
    weight_oracle,
)
from tests.trexport.graph.ops.helpers import OPSET, far, model_of_function, run, stack, stack_shapes
from trexport.errors import ArtifactError, UsageError
from trexport.graph.ops import MAGNITUDE_OPS
from trexport.graph.ops.linear import LinearSignature, linear_function
from trexport.graph.ops.plan import CPU, plan_layer
from trexport.graph.ops.slots import LayerSlot, Slot
from trexport.graph.ops.weight import WeightSignature, weight_function
from trlora import LayerAdapter
from trlora.magnitudes import MAGNITUDES as MAGNITUDE_TYPES

REAL = [member for member in MAGNITUDES if member.type != "none"]
PAIRS = [(None, None), (None, RESIDUALS[1]), (TRANSFORMS[6], RESIDUALS[5])]
STRENGTHS = [0.7, -1.2]

each_magnitude = pytest.mark.parametrize("magnitude", REAL, ids=str)
each_pair = pytest.mark.parametrize(("transform", "residual"), PAIRS, ids=str)


def weight_of() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9))


def adapters_of(transform: Member | None, residual: Member | None, magnitude: Member) -> list[LayerAdapter]:
    return [
        trained(adapter_of(transform, residual, seed, magnitude, weight_of()), seed + 3)
        for seed in range(len(STRENGTHS))
    ]


def inputs(bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    feeds = {"X": torch.randn(2, 3, IN, generator=generator), "W": weight_of()}
    return feeds | ({"B": torch.randn(OUT, generator=generator)} if bias else {})


def expected_of(feeds: dict[str, Tensor], pairs: Sequence[tuple[LayerAdapter, float]]) -> np.ndarray:
    y = feeds["X"].double().numpy() @ weight_oracle(feeds["W"], pairs).T
    return y + bias_oracle(feeds["B"], pairs) if "B" in feeds else y


def test_every_member_of_trlora_has_an_operator() -> None:
    assert set(MAGNITUDE_OPS) == set(MAGNITUDE_TYPES) - {"none"}


@each_magnitude
@each_pair
@pytest.mark.parametrize("bias", [False, True])
def test_two_adapters_at_once(transform: Member | None, residual: Member | None, magnitude: Member, bias: bool) -> None:
    adapters = adapters_of(transform, residual, magnitude)
    slots = tuple(LayerSlot.of(adapter) for adapter in adapters)
    feeds = inputs(bias)
    signature = LinearSignature(slots, OUT, IN, bias, 3, "weight", "fp32")
    shapes = {"X": ("b", "r", IN), "W": (OUT, IN), "B": (OUT,)}
    given = dict(feeds)
    for number, (slot, adapter) in enumerate(zip(slots, adapters, strict=True)):
        own = stack_shapes(slot, f"_{number}")
        shapes |= {f"strength_{number}": (1,), **{name: shape[1:] for name, shape in own.items()}}
        given |= {name: tensor[0] for name, tensor in stack(slot, [adapter], f"_{number}").items()}
        given[f"strength_{number}"] = torch.tensor([STRENGTHS[number]])
    proto = model_of_function(linear_function(signature, signature.name(), OPSET), shapes, ("b", "r", OUT))
    expected = expected_of(feeds, list(zip(adapters, STRENGTHS, strict=True)))
    for found in run(proto, given):
        assert far(found, expected) <= 1e-5


@each_magnitude
@each_pair
@pytest.mark.parametrize("rank", [2, 3])
def test_every_sample_with_its_own(
    transform: Member | None, residual: Member | None, magnitude: Member, rank: int
) -> None:
    adapters = adapters_of(transform, residual, magnitude)
    slot, feeds = LayerSlot.of(adapters[0]), inputs()
    feeds["X"] = feeds["X"] if rank == 3 else feeds["X"][:, 0]
    signature = LinearSignature((slot,), OUT, IN, True, rank, "weight", "fp32", bank=True)
    lead = ("b", "r")[: rank - 1]
    shapes = {"X": (*lead, IN), "W": (OUT, IN), "B": (OUT,), "index": ("b",), "strength_0": ("b",)}
    proto = model_of_function(
        linear_function(signature, signature.name(), OPSET),
        {**shapes, **stack_shapes(slot, "_0")},
        (*lead, OUT),
        {"index": ir.DataType.INT64},
    )
    given = {"index": torch.tensor([1, 0]), "strength_0": torch.tensor(STRENGTHS), **stack(slot, adapters, "_0")}
    expected = np.stack(
        [
            expected_of({**feeds, "X": feeds["X"][row]}, [(adapters[1 - row], STRENGTHS[row])])
            for row in range(len(STRENGTHS))
        ]
    )
    for found in run(proto, feeds | given):
        assert far(found, expected) <= 1e-5


@each_magnitude
@each_pair
def test_several_in_one_weight(transform: Member | None, residual: Member | None, magnitude: Member) -> None:
    adapters = adapters_of(transform, residual, magnitude)
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


def test_the_weight_of_a_convolution_keeps_its_shape() -> None:
    adapters = adapters_of(None, RESIDUALS[1], MAGNITUDES[1])
    slot, weight = LayerSlot.of(adapters[0]), weight_of().reshape(OUT, 5, 3, 3)
    signature = WeightSignature(slot, (OUT, 5, 3, 3), "fp32")
    shapes = {"W": (OUT, 5, 3, 3), "strength": ("adapters",), **stack_shapes(slot)}
    proto = model_of_function(weight_function(signature, signature.name(), OPSET), shapes, (OUT, 5, 3, 3))
    expected = weight_oracle(weight.flatten(1), list(zip(adapters, STRENGTHS, strict=True)))
    for found in run(proto, {"W": weight, "strength": torch.tensor(STRENGTHS), **stack(slot, adapters)}):
        assert far(found, expected.reshape(weight.shape)) <= 1e-5


def test_norms_in_half_precision_are_taken_in_float32() -> None:
    """A row of 45 entries of 50 has a squared norm of 112500, which float16 cannot hold."""
    adapters = [adapter_of(None, RESIDUALS[1], 0, MAGNITUDES[1], torch.full((OUT, IN), 100.0))]
    slot = LayerSlot.of(adapters[0])
    signature = LinearSignature((slot,), OUT, IN, False, 3, "weight", "fp16")
    shapes = {"X": ("b", "r", IN), "W": (OUT, IN), "strength_0": (1,)}
    shapes |= {name: shape[1:] for name, shape in stack_shapes(slot, "_0").items()}
    half = {name: ir.DataType.FLOAT16 for name in ("X", "W", "Y")}
    proto = model_of_function(linear_function(signature, signature.name(), OPSET), shapes, ("b", "r", OUT), half)
    feeds = {"X": torch.ones(1, 1, IN).half() / 8, "W": torch.full((OUT, IN), 50.0).half()}
    given = {name: tensor[0] for name, tensor in stack(slot, adapters, "_0").items()}
    for found in run(proto, {**feeds, "strength_0": torch.ones(1), **given}):
        torch.testing.assert_close(found, torch.full((1, 1, OUT), 100.0 / 8 * IN).half(), rtol=2e-3, atol=0)


def test_the_plan_rebuilds_the_weight() -> None:
    slot = LayerSlot.of(adapters_of(TRANSFORMS[6], RESIDUALS[1], MAGNITUDES[1])[0])
    plan = plan_layer([slot], (OUT, IN), 5, CPU)
    assert plan.path == "weight"
    assert set(plan.cost_ms) == {"weight"}
    with pytest.raises(UsageError, match="--path weight"):
        plan_layer([slot], (OUT, IN), 5, CPU, "activations")


def test_what_does_not_fit_is_refused() -> None:
    norm, scale, scale_all = (LayerSlot.of(adapters_of(None, None, member)[0]) for member in REAL)
    for one, other in ((norm, scale), (scale, scale_all), (norm, scale_all)):
        with pytest.raises(ArtifactError, match="no common shape"):
            one.joined(other)
    with pytest.raises(ArtifactError, match="takes 'norm'"):
        norm.tensors(adapters_of(None, None, MAGNITUDES[2])[0])
    with pytest.raises(ArtifactError, match="the graph takes"):
        scale.tensors(adapters_of(None, None, MAGNITUDES[3])[0])
    plain = LayerSlot.of(adapter_of(None, RESIDUALS[1]))
    with pytest.raises(ArtifactError, match="takes none"):
        plain.tensors(adapters_of(None, RESIDUALS[1], MAGNITUDES[1])[0])
    joined = plain.joined(norm)
    assert set(joined.parts) == {"residual", "magnitude"}
    zero = adapter_of(None, None, 0, MAGNITUDES[1], torch.zeros(OUT, IN))
    with pytest.raises(ArtifactError, match="norm of zero"):
        norm.tensors(zero)


@each_magnitude
def test_a_record_of_slots_is_read_back(magnitude: Member) -> None:
    slot = Slot("", {"a": LayerSlot.of(adapters_of(TRANSFORMS[6], RESIDUALS[1], magnitude)[0])})
    assert Slot.from_dict(slot.to_dict()) == slot
