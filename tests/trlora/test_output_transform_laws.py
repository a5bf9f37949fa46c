"""The laws of transforms on a layer's outputs, alone and with every other kind of part."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import (
    IN,
    MAGNITUDES,
    OUTPUT_TRANSFORMS,
    RESIDUALS,
    TRANSFORMS,
    Member,
    adapter_of,
    bias_oracle,
    bits,
    permutations_of,
    spec_of,
    trained,
    weight_oracle,
)
from tests.trlora.test_magnitude_laws import STRENGTHS, close, layer_of, linear
from trlora import (
    AdaptedConv2d,
    AdaptedLinear,
    CheckpointError,
    LayerAdapter,
    ShapeError,
    adapter_from_model,
    attach_,
    inject_,
    load_adapter,
    merge_,
    remove_,
    save_adapter,
    shapes_of,
)
from trlora.transforms import TRANSFORMS as REGISTRY

BESIDE = [
    (None, None, None),
    (TRANSFORMS[6], None, None),
    (None, RESIDUALS[1], MAGNITUDES[1]),
    (TRANSFORMS[1], RESIDUALS[5], MAGNITUDES[3]),
]
"""Transform, residual and magnitude."""

each_member = pytest.mark.parametrize("member", OUTPUT_TRANSFORMS, ids=str)
each_beside = pytest.mark.parametrize(
    "beside", BESIDE, ids=lambda parts: "+".join(str(p) for p in parts if p) or "alone"
)


def made(member: Member, beside: tuple[Member | None, ...], weight: Tensor | None, seed: int = 0) -> LayerAdapter:
    transform, residual, magnitude = beside
    return adapter_of(transform, residual, seed, magnitude, weight, member)


def test_the_list_holds_every_registered_member() -> None:
    assert {member.type for member in OUTPUT_TRANSFORMS} == set(REGISTRY) - {"identity"}


@each_member
@each_beside
def test_factored_forward_is_merged_forward_at_every_strength(
    member: Member, beside: tuple[Member | None, ...]
) -> None:
    layer = AdaptedLinear(linear(torch.float64))
    layer.add("default", trained(made(member, beside, layer.weight)))
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    for strength in STRENGTHS:
        layer.set_strength("default", strength)
        merged, bias = layer.merged_weight(torch.float64), layer.merged_bias(torch.float64)
        assert bias is not None
        assert layer.bias is not None
        close(layer(x), nn.functional.linear(x, merged, bias))
        close(layer(x[0, 0]), nn.functional.linear(x[0, 0], merged, bias))
        close(merged, torch.from_numpy(weight_oracle(layer.weight, layer.active())))
        close(bias, torch.from_numpy(bias_oracle(layer.bias, layer.active())))


@each_member
@pytest.mark.parametrize("groups", [1, 2])
def test_on_a_convolution(member: Member, groups: int) -> None:
    """28 outputs of 9·5 weights each; an image larger than the kernel, a stride."""
    conv = nn.Conv2d(5 * groups, 28, (3, 3), stride=2, padding=1, groups=groups).double().requires_grad_(False)
    layer = AdaptedConv2d(conv)
    layer.add("default", trained(made(member, (None, RESIDUALS[1], None), None)), 0.6)
    x = torch.randn(2, 5 * groups, 8, 7, dtype=torch.float64)
    merged = copy.deepcopy(conv)
    flat = weight_oracle(conv.weight.flatten(1), layer.active())
    merged.weight.copy_(torch.from_numpy(flat).reshape(conv.weight.shape))
    close(layer(x), merged(x))
    close(layer.merged_weight(torch.float64), merged.weight)


@each_member
def test_several_adapters_add_up_in_any_order(member: Member) -> None:
    base = linear(torch.float64)
    adapters = {
        "one": (trained(made(member, BESIDE[0], base.weight), seed=2), 0.7),
        "two": (trained(adapter_of(TRANSFORMS[-1], RESIDUALS[5]), seed=3), -0.4),
        "three": (trained(made(OUTPUT_TRANSFORMS[1], BESIDE[2], base.weight), seed=4), 1.2),
    }
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    weight = torch.from_numpy(weight_oracle(base.weight, list(adapters.values())))
    for names in permutations_of(list(adapters)):
        layer = AdaptedLinear(base)
        for name in names:
            layer.add(name, *adapters[name])
        close(layer(x), nn.functional.linear(x, weight, base.bias))


@each_member
@each_beside
def test_the_start_and_strength_zero_are_the_base(member: Member, beside: tuple[Member | None, ...]) -> None:
    base = linear()
    layer = AdaptedLinear(base)
    layer.add("default", made(member, beside, base.weight))
    x = torch.randn(2, 3, IN)
    for strength in STRENGTHS:
        layer.set_strength("default", strength)
        if member.exact:
            assert bits(layer.merged_weight()) == bits(base.weight)
        torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(layer.merged_weight(), base.weight, rtol=1e-6, atol=1e-6)
    layer = AdaptedLinear(base)
    layer.add("default", trained(made(member, beside, base.weight)), 0.0)
    assert bits(layer(x)) == bits(base(x))
    assert bits(layer.merged_weight()) == bits(base.weight)


@each_member
def test_save_and_load_inject_and_remove(member: Member, tmp_path: Path) -> None:
    base = nn.Sequential(linear())
    plain = bits(base(torch.ones(2, IN)))
    inject_(base, spec_of(None, RESIDUALS[1], None, member), ["0"])
    trained(layer_of(base).adapters).float()
    saved = adapter_from_model(base)
    expected = bits(base(torch.ones(2, IN)))
    assert expected != plain
    for name in ("folder", "file.safetensors"):
        save_adapter(saved, tmp_path / name)
        loaded = load_adapter(tmp_path / name)
        assert loaded.config == saved.config
        assert loaded.parameters == RESIDUALS[1].parameters + member.parameters
        assert any(key.startswith("0.output_transform.") for key in loaded.tensors())
        target = nn.Sequential(linear())
        attach_(target, loaded.bind(shapes_of(target)))
        assert bits(target(torch.ones(2, IN))) == expected
        merge_(target, torch.float64)
        torch.testing.assert_close(target(torch.ones(2, IN)), base(torch.ones(2, IN)), rtol=1e-5, atol=1e-4)
    remove_(base)
    assert bits(base(torch.ones(2, IN))) == plain


@each_member
def test_the_gradient_of_both_forms_is_the_same(member: Member) -> None:
    layer = AdaptedLinear(linear(torch.float64))
    layer.add("default", trained(made(member, BESIDE[1], layer.weight)))
    x = torch.randn(3, 2, IN, dtype=torch.float64)
    parameters = list(layer.adapters.parameters())
    factored = torch.autograd.grad(layer(x).sin().sum(), parameters)
    dense = nn.functional.linear(x, layer.merged_weight(torch.float64), layer.bias)
    merged = torch.autograd.grad(dense.sin().sum(), parameters)
    for one, other in zip(factored, merged, strict=True):
        assert (one != 0).any()
        close(one, other)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(linear())
    inject_(base, spec_of(None, None, None, OUTPUT_TRANSFORMS[1]), ["0"])
    saved = adapter_from_model(base)
    with pytest.raises(CheckpointError, match="for any → 28 features, the base's layer has 45 → 21"):
        saved.bind({"0": (21, IN)})
    with pytest.raises(ShapeError, match="output transform is for 45 outputs"):
        LayerAdapter(
            spec_of(),
            trained(adapter_of(TRANSFORMS[1])).transform,
            adapter_of(None, RESIDUALS[1]).residual,
            None,
            adapter_of(TRANSFORMS[1]).transform,
        )
