"""The laws of magnitudes, on layers with every kind of part beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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
    permutations_of,
    spec_of,
    state_bits,
    trained,
    weight_oracle,
)
from trlora import (
    AdaptedLinear,
    SpecError,
    adapter_from_model,
    attach_,
    inject_,
    load_adapter,
    merge_,
    remove_,
    save_adapter,
    shapes_of,
)
from trlora.magnitudes import MAGNITUDES as MAGNITUDE_REGISTRY
from trlora.magnitudes import NormMagnitude

STRENGTHS = [1.0, 0.3, -1.75]
PAIRS = [(None, None), (None, RESIDUALS[1]), (TRANSFORMS[6], None), (TRANSFORMS[1], RESIDUALS[5])]

each_magnitude = pytest.mark.parametrize("magnitude", MAGNITUDES, ids=str)
each_pair = pytest.mark.parametrize(("transform", "residual"), PAIRS, ids=str)
each_bias = pytest.mark.parametrize("bias", [True, False])


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Linear(IN, OUT, bias, dtype=dtype).requires_grad_(False)


def gold(transform: Member | None, residual: Member | None, magnitude: Member, bias: bool = True) -> AdaptedLinear:
    """An adapted layer with trained parameters, float64."""
    layer = AdaptedLinear(linear(torch.float64, bias))
    layer.add("default", trained(adapter_of(transform, residual, magnitude=magnitude, weight=layer.weight)))
    return layer


def layer_of(model: nn.Sequential) -> AdaptedLinear:
    layer = model[0]
    assert isinstance(layer, AdaptedLinear)
    return layer


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-11, atol=1e-11)


def test_the_list_holds_every_registered_member() -> None:
    assert {member.type for member in MAGNITUDES} == set(MAGNITUDE_REGISTRY)
    assert {name: spec.type for name, spec in MAGNITUDE_REGISTRY.items()} == {name: name for name in MAGNITUDE_REGISTRY}


@each_magnitude
@each_pair
@each_bias
def test_factored_forward_is_merged_forward_at_every_strength(
    transform: Member | None, residual: Member | None, magnitude: Member, bias: bool
) -> None:
    layer = gold(transform, residual, magnitude, bias)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    for strength in STRENGTHS:
        layer.set_strength("default", strength)
        merged, merged_bias = layer.merged_weight(torch.float64), layer.merged_bias(torch.float64)
        close(layer(x), nn.functional.linear(x, merged, merged_bias))
        close(merged, torch.from_numpy(weight_oracle(layer.weight, layer.active())))
        if layer.bias is not None:
            assert merged_bias is not None
            close(merged_bias, torch.from_numpy(bias_oracle(layer.bias, layer.active())))


@each_magnitude
def test_several_adapters_add_up_in_any_order(magnitude: Member) -> None:
    base = linear(torch.float64)
    assert base.bias is not None
    adapters = {
        "one": (trained(adapter_of(None, RESIDUALS[1], 2, magnitude, base.weight), seed=2), 0.7),
        "two": (trained(adapter_of(TRANSFORMS[-1], RESIDUALS[5]), seed=3), -0.4),
        "three": (trained(adapter_of(TRANSFORMS[2], None, 4, MAGNITUDES[1], base.weight), seed=4), 1.2),
        "four": (trained(adapter_of(None, None, 4, MAGNITUDES[3]), seed=5), 0.5),
    }
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    weight = torch.from_numpy(weight_oracle(base.weight, list(adapters.values())))
    bias = torch.from_numpy(bias_oracle(base.bias, list(adapters.values())))
    for names in permutations_of(list(adapters)):
        layer = AdaptedLinear(base)
        for name in names:
            layer.add(name, *adapters[name])
        close(layer(x), nn.functional.linear(x, weight, bias))
        close(layer.merged_weight(torch.float64), weight)


@each_magnitude
@each_pair
def test_the_start_and_strength_zero_are_the_base(
    transform: Member | None, residual: Member | None, magnitude: Member
) -> None:
    base = linear()
    x = torch.randn(2, 3, IN)
    for adapter, strengths in (
        (adapter_of(transform, residual, magnitude=magnitude, weight=base.weight), STRENGTHS),
        (trained(adapter_of(transform, residual, magnitude=magnitude, weight=base.weight)), [0.0]),
    ):
        layer = AdaptedLinear(base)
        layer.add("default", adapter)
        for strength in strengths:
            layer.set_strength("default", strength)
            merged_bias = layer.merged_bias()
            assert merged_bias is not None
            assert bits(layer(x)) == bits(base(x))
            assert bits(layer.merged_weight()) == bits(base.weight)
            assert bits(merged_bias) == bits(base.bias)


@each_magnitude
def test_save_and_load_give_the_same_bits(magnitude: Member, tmp_path: Path) -> None:
    source = nn.Sequential(linear())
    inject_(source, spec_of(None, RESIDUALS[1], magnitude), ["0"])
    trained(layer_of(source).adapters).float()
    saved = adapter_from_model(source)
    x = torch.randn(2, IN)
    expected = bits(source(x))
    for name in ("folder", "file.safetensors"):
        save_adapter(saved, tmp_path / name)
        loaded = load_adapter(tmp_path / name)
        assert {key: bits(tensor) for key, tensor in loaded.tensors().items()} == {
            key: bits(tensor) for key, tensor in saved.tensors().items()
        }
        assert loaded.config == saved.config
        assert loaded.parameters == 4 * (IN + OUT) + magnitude.parameters
        target = nn.Sequential(linear())
        attach_(target, loaded.bind(shapes_of(target)))
        assert bits(target(x)) == expected


@each_magnitude
def test_merging_a_model_changes_weight_and_bias(magnitude: Member) -> None:
    model = nn.Sequential(linear(torch.float64))
    inject_(model, spec_of(None, RESIDUALS[1], magnitude), ["0"])
    trained(layer_of(model).adapters)
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = model(x)
    merge_(model, torch.float64)
    assert isinstance(model[0], nn.Linear)
    close(model(x), expected)


@each_magnitude
def test_inject_and_remove_restore_the_bits(magnitude: Member) -> None:
    model = nn.Sequential(linear())
    before = state_bits(model)
    inject_(model, spec_of(None, None, magnitude), ["0"])
    trained(layer_of(model).adapters).float()
    model(torch.randn(2, IN))
    remove_(model)
    assert state_bits(model) == before


@each_magnitude
def test_the_gradient_reaches_every_parameter(magnitude: Member) -> None:
    layer = gold(None, RESIDUALS[1], magnitude)
    x = torch.randn(11, IN, dtype=torch.float64)
    parameters = list(layer.adapters.parameters())
    factored = torch.autograd.grad(layer(x).sin().sum(), parameters)
    dense = nn.functional.linear(x, layer.merged_weight(torch.float64), layer.merged_bias(torch.float64))
    merged = torch.autograd.grad(dense.sin().sum(), parameters)
    for one, other in zip(factored, merged, strict=True):
        assert (one != 0).any()
        close(one, other)


def test_the_norms_of_the_adapted_rows_are_those_that_are_trained() -> None:
    layer = gold(TRANSFORMS[6], RESIDUALS[1], MAGNITUDES[1])
    ((adapter, _),) = layer.active()
    assert isinstance(adapter.magnitude, NormMagnitude)
    close(torch.linalg.vector_norm(layer.merged_weight(torch.float64), dim=1), adapter.magnitude.norm.abs())


def test_a_row_of_zeros_stays_one() -> None:
    base = linear()
    base.weight[3] = 0
    layer = AdaptedLinear(base)
    layer.add("default", adapter_of(None, RESIDUALS[1], magnitude=MAGNITUDES[1], weight=base.weight))
    assert bits(layer.merged_weight()) == bits(base.weight)


def test_norms_start_from_a_weight() -> None:
    with pytest.raises(SpecError, match="base weight"):
        adapter_of(None, None, magnitude=MAGNITUDES[1])
