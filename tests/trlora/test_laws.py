"""The laws that every transform, every residual and every pair of them keeps. A new member is one line in the helpers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    IN,
    OUT,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    bits,
    permutations_of,
    spec_of,
    state_bits,
    trained,
    weight_oracle,
)
from trlora import (
    AdaptedLinear,
    LayerAdapter,
    adapter_from_model,
    attach_,
    inject_,
    load_adapter,
    remove_,
    save_adapter,
    set_strengths_,
    shapes_of,
)
from trlora.residuals import RESIDUALS as RESIDUAL_REGISTRY
from trlora.transforms import TRANSFORMS as TRANSFORM_REGISTRY

BATCHES = [(), (1,), (2, 3)]
STRENGTHS = [1.0, 0.3, -1.75]
PAIRS = [pytest.param(t, r, id=f"{t}+{r}") for t, r in product(TRANSFORMS, RESIDUALS)]
TRAINABLE = [
    pytest.param(t, r, id=f"{t}+{r}") for t, r in product(TRANSFORMS, RESIDUALS) if t.parameters + r.parameters
]

each_transform = pytest.mark.parametrize("member", TRANSFORMS, ids=str)
each_residual = pytest.mark.parametrize("member", RESIDUALS, ids=str)
each_pair = pytest.mark.parametrize(("transform", "residual"), PAIRS)
each_trainable_pair = pytest.mark.parametrize(("transform", "residual"), TRAINABLE)


def linear(dtype: torch.dtype = torch.float32, seed: int = 7) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers to adapt, with what is not adapted around them."""
    return nn.Sequential(nn.LayerNorm(IN, dtype=dtype), linear(dtype), nn.Linear(OUT, IN, dtype=dtype), linear(dtype))


def gold(transform: Member, residual: Member, dtype: torch.dtype = torch.float64) -> AdaptedLinear:
    """An adapted layer with trained parameters."""
    layer = AdaptedLinear(linear(dtype))
    layer.add("default", trained(adapter_of(transform, residual)))
    return layer


COMPANIONS = {
    "two": (trained(adapter_of(TRANSFORMS[-1], RESIDUALS[1]), seed=3), -0.4),
    "three": (trained(adapter_of(TRANSFORMS[2], RESIDUALS[-1]), seed=4), 1.2),
}
"""Adapters to put beside another."""


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def test_the_lists_hold_every_registered_member() -> None:
    assert {member.type for member in TRANSFORMS} == set(TRANSFORM_REGISTRY)
    assert {member.type for member in RESIDUALS} == set(RESIDUAL_REGISTRY)
    for registry in (TRANSFORM_REGISTRY, RESIDUAL_REGISTRY):
        assert {name: spec.type for name, spec in registry.items()} == {name: name for name in registry}


@each_transform
def test_a_transform_is_its_matrix(member: Member) -> None:
    transform = trained(adapter_of(member).transform)
    matrix = transform.matrix().double()
    assert matrix.shape == (IN, IN)
    for batch in BATCHES:
        x = torch.randn(*batch, IN, dtype=torch.float64)
        close(transform(x), x @ matrix.T)


@each_transform
def test_a_transform_multiplies_a_weight_by_its_matrix(member: Member) -> None:
    transform = trained(adapter_of(member).transform)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    close(transform.multiply(weight), weight @ transform.matrix().double())


@each_transform
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transforms_change_of_a_weight_is_a_new_tensor(member: Member, dtype: torch.dtype) -> None:
    transform = trained(adapter_of(member).transform, amount=0.1).to(dtype)
    weight = torch.randn(OUT, IN, dtype=dtype)
    before = weight.clone()
    change = transform.change(weight)
    assert change.dtype == dtype
    close(
        change.double() + weight.double(),
        weight.double() @ transform.matrix().double(),
        1e-5 if dtype == torch.float32 else 1e-11,
    )
    change.zero_()
    assert torch.equal(weight, before)


@each_residual
def test_a_residual_is_its_delta(member: Member) -> None:
    residual = trained(adapter_of(None, member).residual)
    delta = residual.delta().double()
    assert delta.shape == (OUT, IN)
    for batch in BATCHES:
        x = torch.randn(*batch, IN, dtype=torch.float64)
        close(residual(x), x @ delta.T)


@each_residual
def test_a_residual_is_its_two_factors(member: Member) -> None:
    residual = trained(adapter_of(None, member).residual)
    left, right = residual.low_rank()
    assert left.shape[0] == OUT
    assert right.shape[0] == IN
    close(left.double() @ right.double().T, residual.delta().double())


@each_residual
def test_a_residual_adds_its_delta_in_place(member: Member) -> None:
    residual = trained(adapter_of(None, member).residual)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    expected = weight + residual.delta().double()
    with torch.no_grad():
        assert residual.add_to(weight) is weight
    close(weight, expected)


@each_transform
def test_a_trained_transform_is_no_longer_the_identity(member: Member) -> None:
    """Guards the other laws: they would say little about members that random parameters leave at their start."""
    matrix = trained(adapter_of(member).transform).matrix().double()
    assert torch.equal(matrix, torch.eye(IN, dtype=torch.float64)) == (member.type == "identity")
    assert adapter_of(member).transform.trivial == (member.type == "identity")


@each_residual
def test_a_trained_residual_is_no_longer_zero(member: Member) -> None:
    delta = trained(adapter_of(None, member).residual).delta()
    assert bool(delta.any()) == (member.type != "none")
    assert adapter_of(None, member).residual.trivial == (member.type == "none")


@each_pair
def test_parameters_are_counted_as_by_hand(transform: Member, residual: Member) -> None:
    adapter = adapter_of(transform, residual)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == transform.parameters + residual.parameters


@each_pair
def test_factored_forward_is_merged_forward_at_every_strength(transform: Member, residual: Member) -> None:
    layer = gold(transform, residual)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    for strength in STRENGTHS:
        layer.set_strength("default", strength)
        merged = layer.merged_weight(torch.float64)
        close(layer(x), nn.functional.linear(x, merged, layer.bias))
        expected = weight_oracle(layer.weight, [(adapter_of_layer(layer), strength)])
        close(merged, torch.from_numpy(expected))


def adapter_of_layer(layer: AdaptedLinear) -> LayerAdapter:
    ((adapter, _),) = layer.active()
    return adapter


@each_pair
def test_several_adapters_add_up_in_any_order(transform: Member, residual: Member) -> None:
    """Each pair together with a tensor ring and a low-rank adapter."""
    adapters = {"one": (trained(adapter_of(transform, residual), seed=2), 0.7), **COMPANIONS}
    base = linear(torch.float64)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    weight = torch.from_numpy(weight_oracle(base.weight, list(adapters.values())))
    expected = nn.functional.linear(x, weight, base.bias)
    for names in permutations_of(list(adapters)):
        layer = AdaptedLinear(base)
        for name in names:
            layer.add(name, *adapters[name])
        close(layer(x), expected)
        close(layer.merged_weight(torch.float64), weight)


@each_pair
def test_the_start_is_the_base(transform: Member, residual: Member) -> None:
    base = linear()
    layer = AdaptedLinear(base)
    layer.add("default", adapter_of(transform, residual))
    x = torch.randn(2, 3, IN)
    for strength in STRENGTHS:
        layer.set_strength("default", strength)
        if transform.exact_factored and residual.exact_factored:
            assert bits(layer(x)) == bits(base(x))
        if transform.exact and residual.exact:
            assert bits(layer.merged_weight()) == bits(base.weight)
        torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.merged_weight(), base.weight, rtol=1e-6, atol=1e-6)


@each_pair
def test_strength_zero_is_the_base_bit_for_bit(transform: Member, residual: Member) -> None:
    base = linear()
    layer = AdaptedLinear(base)
    layer.add("default", trained(adapter_of(transform, residual)), strength=0.0)
    x = torch.randn(2, 3, IN)
    assert bits(layer(x)) == bits(base(x))
    assert bits(layer.merged_weight()) == bits(base.weight)


@each_trainable_pair
def test_save_and_load_give_the_same_bits(transform: Member, residual: Member, tmp_path: Path) -> None:
    source = nn.Sequential(linear())
    inject_(source, spec_of(transform, residual), ["0"])
    trained_adapters(source)
    saved = adapter_from_model(source)
    x = torch.randn(2, IN)
    expected = bits(source(x))
    assert expected != bits(linear()(x))
    for name in ("folder", "file.safetensors"):
        save_adapter(saved, tmp_path / name)
        loaded = load_adapter(tmp_path / name)
        assert {key: bits(tensor) for key, tensor in loaded.tensors().items()} == {
            key: bits(tensor) for key, tensor in saved.tensors().items()
        }
        assert loaded.config == saved.config
        assert loaded.parameters == transform.parameters + residual.parameters
        target = nn.Sequential(linear())
        attach_(target, loaded.bind(shapes_of(target)))
        assert bits(target(x)) == expected


@each_pair
def test_inject_and_remove_restore_the_very_modules(transform: Member, residual: Member) -> None:
    base = model()
    modules, before = dict(base.named_modules()), state_bits(base)
    x = torch.randn(2, IN)
    expected = bits(base(x))
    inject_(base, spec_of(transform, residual), ["1", "3"])
    trained_adapters(base)
    if transform.parameters + residual.parameters:
        assert bits(base(x)) != expected
    assert remove_(base) == ["1", "3"]
    restored = dict(base.named_modules())
    assert list(restored) == list(modules)
    assert all(restored[path] is module for path, module in modules.items())
    assert state_bits(base) == before
    assert bits(base(x)) == expected


def trained_adapters(base: nn.Module) -> None:
    for layer in base.modules():
        if isinstance(layer, AdaptedLinear):
            trained(layer.adapters).float()


@each_trainable_pair
def test_the_gradient_reaches_every_parameter(transform: Member, residual: Member) -> None:
    """After one optimiser step, for a factor beside a factor that starts at zero has no gradient before."""
    layer = AdaptedLinear(linear(torch.float64))
    layer.add("default", adapter_of(transform, residual).double())
    parameters = dict(layer.adapters.named_parameters())
    x, wanted = torch.randn(11, IN, dtype=torch.float64), torch.randn(11, OUT, dtype=torch.float64)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    assert layer.weight.grad is None


@each_trainable_pair
def test_the_gradient_of_both_forms_is_the_same(transform: Member, residual: Member) -> None:
    layer = gold(transform, residual)
    x = torch.randn(3, 2, IN, dtype=torch.float64)
    parameters = list(layer.adapters.parameters())
    factored = torch.autograd.grad(layer(x).sin().sum(), parameters)
    dense = nn.functional.linear(x, layer.merged_weight(torch.float64), layer.bias)
    merged = torch.autograd.grad(dense.sin().sum(), parameters)
    for one, other in zip(factored, merged, strict=True):
        close(one, other)


@each_transform
def test_penalties_vanish_at_the_start_and_have_finite_gradients(member: Member) -> None:
    transform = adapter_of(member).transform.double()
    for penalty in (transform.identity_penalty, transform.orthogonal_penalty):
        value = penalty()
        assert value.shape == ()
        assert value.item() == 0 if member.exact else value.item() < 1e-5
        if value.requires_grad:
            gradients = torch.autograd.grad(value, list(transform.parameters()), allow_unused=True)
            assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@each_transform
def test_the_identity_penalty_grows_once_trained(member: Member) -> None:
    penalty = trained(adapter_of(member).transform).identity_penalty().item()
    assert penalty == 0 if member.type == "identity" else penalty > 0.1


def test_strengths_are_set_by_name_across_the_model() -> None:
    base = model(torch.float64)
    inject_(base, spec_of(TRANSFORMS[-1], RESIDUALS[-1]), ["1", "3"])
    for layer in base.modules():
        if isinstance(layer, AdaptedLinear):
            trained(layer.adapters)
    x = torch.randn(2, IN, dtype=torch.float64)
    full = base(x)
    set_strengths_(base, {"default": 0.0})
    off = base(x)
    set_strengths_(base, {"default": 1.0})
    assert bits(base(x)) == bits(full)
    remove_(base)
    assert bits(base(x)) == bits(off)
