"""The operator of a convolution against torch's own with the adapted weight, in float64, in two runtimes that are not
ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    IN,
    MAGNITUDES,
    OUT,
    OUTPUT_TRANSFORMS,
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
from trexport.errors import UsageError
from trexport.graph.ops.conv import ConvSignature, conv_function
from trexport.graph.ops.plan import CPU, Path, plan_layer
from trexport.graph.ops.slots import LayerSlot
from trexport.io_spec import Dtype
from trlora import LayerAdapter

STRENGTHS = [0.7, -1.2]
GEOMETRIES: dict[str, tuple[int, dict[str, Any]]] = {
    "1x1": (45, {"kernel_size": 1}),
    "1x1, strided, of groups": (90, {"kernel_size": 1, "stride": 2, "groups": 2}),
    "3x3": (5, {"kernel_size": 3, "padding": 1}),
    "3x3, strided": (5, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "3x3, of groups, dilated": (20, {"kernel_size": 3, "padding": (2, 1), "groups": 4, "dilation": (2, 1)}),
    "1x3": (15, {"kernel_size": (1, 3), "stride": (1, 2)}),
}
"""Channels in, and torch's arguments: 45 weights for each of 28 outputs, whatever the shape."""

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)
THIN = [member for member in RESIDUALS if member.type in ("low_rank", "tensor_ring", "hadamard")]


def conv_of(geometry: str, bias: bool = True) -> nn.Conv2d:
    channels, fields = GEOMETRIES[geometry]
    conv = nn.Conv2d(channels, OUT, bias=bias, **fields).requires_grad_(False)
    assert conv.weight[0].numel() == IN
    return conv


def signature_of(conv: nn.Conv2d, slots: Sequence[LayerSlot], path: Path, dtype: Dtype = "fp32") -> ConvSignature:
    assert not isinstance(conv.padding, str)
    attributes = {
        "strides": tuple(conv.stride),
        "pads": tuple(conv.padding) * 2,
        "dilations": tuple(conv.dilation),
        "group": conv.groups,
    }
    shape: Any = tuple(conv.weight.shape)
    return ConvSignature(tuple(slots), shape, conv.bias is not None, attributes, path, dtype)


def drawn(
    conv: nn.Conv2d, x: Tensor, adapters: Sequence[LayerAdapter], path: Path, strengths: Sequence[float]
) -> tuple[Tensor, Tensor]:
    slots = [LayerSlot.of(adapter) for adapter in adapters]
    signature = signature_of(conv, slots, path)
    shapes: dict[str, Any] = {"X": ("b", *x.shape[1:]), "W": tuple(conv.weight.shape), "B": (OUT,)}
    given = {"X": x, "W": conv.weight.data} | ({"B": conv.bias.data} if conv.bias is not None else {})
    for number, (slot, adapter) in enumerate(zip(slots, adapters, strict=True)):
        own = stack_shapes(slot, f"_{number}")
        shapes |= {f"strength_{number}": (1,), **{name: shape[1:] for name, shape in own.items()}}
        given |= {name: tensor[0] for name, tensor in stack(slot, [adapter], f"_{number}").items()}
        given[f"strength_{number}"] = torch.tensor([strengths[number]])
    proto = model_of_function(conv_function(signature, signature.name(), OPSET), shapes, ("b", OUT, None, None))
    return run(proto, given)


def expected_of(conv: nn.Conv2d, x: Tensor, adapters: Sequence[LayerAdapter]) -> np.ndarray:
    pairs = list(zip(adapters, STRENGTHS, strict=False))
    wide = conv.double()
    weight = torch.from_numpy(weight_oracle(wide.weight.flatten(1), pairs)).reshape(wide.weight.shape)
    bias = None if wide.bias is None else torch.from_numpy(bias_oracle(wide.bias, pairs))
    result = wide._conv_forward(x.double(), weight, bias).numpy()
    conv.float()
    return result


def image(conv: nn.Conv2d) -> Tensor:
    return torch.randn(2, conv.in_channels, 9, 8)


@each_geometry
@pytest.mark.parametrize("path", ["activations", "weight"])
def test_two_low_rank_adapters_at_once(geometry: str, path: Path) -> None:
    conv = conv_of(geometry)
    adapters = [trained(adapter_of(None, RESIDUALS[number], number), number + 3) for number in (1, 2)]
    x = image(conv)
    expected = expected_of(conv, x, adapters)
    for found in drawn(conv, x, adapters, path, STRENGTHS):
        assert far(found, expected) <= 1e-5


@pytest.mark.parametrize("residual", THIN, ids=str)
@pytest.mark.parametrize("geometry", ["1x3", "3x3, of groups, dilated"])
def test_every_residual_that_is_two_thin_convolutions(residual: Member, geometry: str) -> None:
    conv = conv_of(geometry, bias=False)
    adapters = [trained(adapter_of(None, residual))]
    x = image(conv)
    expected = expected_of(conv, x, adapters)
    for found in drawn(conv, x, adapters, "activations", STRENGTHS):
        assert far(found, expected) <= 1e-5


@pytest.mark.parametrize("parts", [
    (TRANSFORMS[6], RESIDUALS[1], None, None), (None, RESIDUALS[8], None, None), (None, RESIDUALS[1], MAGNITUDES[1], None),
    (TRANSFORMS[1], None, MAGNITUDES[3], OUTPUT_TRANSFORMS[1]),
], ids=["TLoRA", "LoKr", "DoRA", "outside"])  # fmt: skip
@pytest.mark.parametrize("geometry", ["3x3, strided", "3x3, of groups, dilated"])
def test_what_has_no_form_on_activations_rebuilds_the_weight(parts: tuple[Member | None, ...], geometry: str) -> None:
    conv, (transform, residual, magnitude, turn) = conv_of(geometry), parts
    made = adapter_of(transform, residual, 0, magnitude, conv.weight.flatten(1), turn)
    adapters = [trained(made)]
    plan = plan_layer([LayerSlot.of(made)], tuple(conv.weight.shape), 72, CPU)
    assert set(plan.cost_ms) == {"weight"}
    x = image(conv)
    expected = expected_of(conv, x, adapters)
    for found in drawn(conv, x, adapters, "weight", STRENGTHS):
        assert far(found, expected) <= 1e-5
    with pytest.raises(UsageError, match="--path weight"):
        plan_layer([LayerSlot.of(made)], tuple(conv.weight.shape), 72, CPU, "activations")


def test_at_strength_zero_it_is_the_base_to_the_last_bit() -> None:
    conv = conv_of("3x3")
    adapters = [trained(adapter_of(None, RESIDUALS[1])).float()]
    x = image(conv)
    plain = drawn(conv, x, [], "activations", [])
    for found, base in zip(drawn(conv, x, adapters, "activations", [0.0]), plain, strict=True):
        assert bits(found) == bits(base)


def test_in_half_precision() -> None:
    conv = conv_of("3x3, strided")
    adapter = trained(adapter_of(None, RESIDUALS[1]))
    slot, x = LayerSlot.of(adapter), image(conv).half()
    signature = signature_of(conv, [slot], "activations", "fp16")
    shapes: dict[str, Any] = {"X": tuple(x.shape), "W": tuple(conv.weight.shape), "B": (OUT,), "strength_0": (1,)}
    shapes |= {name: shape[1:] for name, shape in stack_shapes(slot, "_0").items()}
    half = {name: ir.DataType.FLOAT16 for name in ("X", "W", "B", "Y")}
    function = conv_function(signature, signature.name(), OPSET)
    proto = model_of_function(function, shapes, (2, OUT, None, None), half)
    assert conv.bias is not None
    given = {"X": x, "W": conv.weight.half(), "B": conv.bias.half(), "strength_0": torch.tensor([STRENGTHS[0]])}
    given |= {name: tensor[0] for name, tensor in stack(slot, [adapter], "_0").items()}
    expected = expected_of(conv.half().float(), x.float(), [adapter])
    for found in run(proto, given):
        assert found.dtype == torch.float16
        assert far(found, expected) <= 2e-3


def test_the_plan_weighs_both() -> None:
    """A thin pair for few places, the whole weight for many; nothing to form for `dense`."""
    slot = LayerSlot.of(trained(adapter_of(None, RESIDUALS[1])))
    shape = (320, 320, 3, 3)
    wide = LayerSlot.of(
        LayerAdapter.from_spec(adapter_of(None, RESIDUALS[1]).spec, 2880, 320, torch.Generator().manual_seed(0))
    )
    assert plan_layer([wide], shape, 16, CPU).path == "activations"
    assert plan_layer([wide], shape, 64 * 64 * 16, CPU).path == "weight"
    assert plan_layer([slot], (OUT, 5, 3, 3), 16, CPU, "dense").path == "activations"
