from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import (
    ATTENTION_PATHS,
    BLOCK,
    RESIDUALS,
    TRANSFORMS,
    adapter_of,
    bits,
    spec_of,
    state_bits,
    tiny_inputs,
    tiny_unet,
    trained,
    ulps,
    weight_oracle,
)
from trlora import (
    AdaptedLinear,
    AdapterSpec,
    TargetError,
    adapted_modules,
    adapted_weight,
    inject_,
    merge_,
    merge_layer,
    weight_change,
)

SPEC = AdapterSpec.from_dict(
    {"transform": {"type": "tensor_ring", "rank": [2, 3, 1]}, "residual": {"type": "tensor_ring", "rank": 2}}
)


def adapted(spec: AdapterSpec = SPEC, strength: float = 0.8, targets: str = "attention") -> nn.Module:
    """The small model with trained adapters, float32."""
    model = tiny_unet()
    inject_(model, spec, targets, strength=strength)
    for seed, layer in enumerate(adapted_modules(model).values()):
        trained(layer.adapters, seed=seed, amount=0.2).float()
    return model


def relative(merged: np.ndarray, base: torch.Tensor) -> float:
    w0 = base.detach().double().numpy()
    return math.sqrt(((merged - w0) ** 2).sum()) / math.sqrt((w0**2).sum())


def test_the_merged_model_is_the_adapted_one_with_plain_layers() -> None:
    model, sample = adapted(), tiny_inputs()
    plain = tiny_unet()
    expected = model(*sample)
    bases = {path: layer.base for path, layer in adapted_modules(model).items()}
    report = merge_(model)
    assert [layer.path for layer in report.layers] == ATTENTION_PATHS
    assert not adapted_modules(model)
    assert all(model.get_submodule(path) is base for path, base in bases.items())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    torch.testing.assert_close(model(*sample), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(*sample), expected, rtol=1e-2, atol=1e-2)
    changed = {name for name, data in state_bits(model).items() if data != state_bits(plain)[name]}
    assert changed == {f"{path}.weight" for path in ATTENTION_PATHS}  # no bias, and no layer without adapter


def test_the_report_tells_the_relative_change_of_every_layer() -> None:
    model = adapted()
    expected = {
        path: relative(weight_oracle(layer.weight, layer.active()), layer.weight)
        for path, layer in adapted_modules(model).items()
    }
    report = merge_(model)
    found = {layer.path: layer.relative_change for layer in report.layers}
    assert found == pytest.approx(expected, rel=1e-5)
    assert min(expected.values()) > 0.01
    assert report.unchanged == ()
    assert report.seconds == pytest.approx(sum(layer.seconds for layer in report.layers))
    assert all(layer.seconds >= 0 for layer in report.layers)


def test_the_report_shows_the_ten_layers_that_changed_most() -> None:
    model = adapted(targets="transformer")
    report = merge_(model)
    assert len(report.layers) == 10
    text = str(report)
    order = sorted(report.layers, key=lambda layer: layer.relative_change, reverse=True)
    places = [text.index(layer.path) for layer in order]
    assert places == sorted(places)
    assert f"{order[0].relative_change:.3e}" in text


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_changes_nothing_is_reported_and_keeps_its_bits(strength: float) -> None:
    model = tiny_unet()
    before = state_bits(model)
    inject_(model, spec_of(TRANSFORMS[6], RESIDUALS[1]), strength=strength)  # at its start
    report = merge_(model)
    assert report.unchanged == tuple(ATTENTION_PATHS)
    assert {layer.relative_change for layer in report.layers} == {0.0}
    assert state_bits(model) == before


def test_a_zero_weight_has_an_infinite_relative_change() -> None:
    adapter = trained(adapter_of(None, RESIDUALS[1]))
    weight = torch.zeros(28, 45)
    _, record = merge_layer("a", weight, [(adapter, 1.0)])
    assert record.relative_change == math.inf
    _, record = merge_layer("a", weight, [(adapter_of(None, RESIDUALS[1]), 1.0)])
    assert record.relative_change == 0.0


def test_a_model_without_adapters_cannot_be_merged() -> None:
    with pytest.raises(TargetError, match="TinyUNet"):
        merge_(tiny_unet())


def test_merging_needs_no_gradient() -> None:
    model = adapted()
    merge_(model)
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in model.parameters())


# --- precision ---------------------------------------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]
MEMBERS = [(t, r) for t in TRANSFORMS[1:] for r in (RESIDUALS[2], RESIDUALS[5])]
IDS = [f"{t}+{r}" for t, r in MEMBERS]


def half_layer(dtype: torch.dtype) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Linear(45, 28, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("transform", "residual"), MEMBERS, ids=IDS)
@pytest.mark.parametrize("same", [False, True], ids=["float32 adapter", "half adapter"])
def test_a_half_precision_base_is_computed_in_float32_and_cast_once(transform, residual, dtype, same: bool) -> None:
    base = half_layer(dtype)
    adapter = trained(adapter_of(transform, residual), amount=0.1).to(dtype if same else torch.float32)
    model = nn.Sequential(AdaptedLinear(base))
    layer = model[0]
    assert isinstance(layer, AdaptedLinear)
    layer.add("default", adapter, 0.75)
    wide = copy.deepcopy(adapter).double()
    expected = torch.from_numpy(weight_oracle(base.weight, [(wide, 0.75)])).to(dtype)
    weight = layer.merged_weight()
    assert weight.dtype == dtype
    distance = ulps(weight, expected)
    # in half precision throughout, a good part of the entries would be further off
    assert ((distance <= 1) | ((weight.double() - expected.double()).abs() < 1e-6)).all()
    assert (distance == 0).double().mean() > 0.97
    merge_(model)
    assert model[0] is base
    # not to the bit: some BLAS choose their kernel by where in memory an operand lies, and this is computed a second time
    again = (ulps(base.weight, weight) <= 1) | ((base.weight.double() - weight.double()).abs() < 1e-6)
    assert again.all()
    assert adapter.dtype == (dtype if same else torch.float32)  # computing left it as it was


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("transform", "residual"), MEMBERS, ids=IDS)
@pytest.mark.parametrize("same", [False, True], ids=["float32 adapter", "half adapter"])
def test_a_half_precision_layer_runs_and_keeps_its_dtype(transform, residual, dtype, same: bool) -> None:
    base = half_layer(dtype)
    layer = AdaptedLinear(base)
    adapter = trained(adapter_of(transform, residual), amount=0.1).to(dtype if same else torch.float32)
    layer.add("default", adapter)
    x = torch.randn(2, 3, 45).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = nn.functional.linear(x.float(), layer.merged_weight().float(), base.bias.float())
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 16 * torch.finfo(dtype).eps


def test_the_compute_dtype_is_obeyed() -> None:
    base = half_layer(torch.float32)
    adapter = trained(adapter_of(TRANSFORMS[6], RESIDUALS[5]))
    expected = torch.from_numpy(weight_oracle(base.weight, [(adapter, 1.5)]))
    change = weight_change(base.weight, [(adapter, 1.5)], torch.float64)
    assert change is not None
    assert change.dtype == torch.float64
    torch.testing.assert_close(change.detach(), expected - base.weight.detach().double(), rtol=1e-12, atol=1e-12)
    merged = adapted_weight(base.weight, [(adapter, 1.5)], torch.float64)
    assert bits(merged) == bits(expected.float()) or ulp_float(merged.detach(), expected.float()) <= 1


def ulp_float(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs() / (b.abs() * torch.finfo(torch.float32).eps)).max().item()


def test_nothing_to_change_is_none() -> None:
    base = half_layer(torch.float32)
    assert weight_change(base.weight, []) is None
    assert weight_change(base.weight, [(adapter_of(TRANSFORMS[6]), 0.0)]) is None
    assert weight_change(base.weight, [(adapter_of(), 1.0)]) is None
    assert adapted_weight(base.weight, [(adapter_of(), 1.0)]) is base.weight


def test_one_layer_may_be_merged_alone() -> None:
    """The merged weight comes in the compute dtype, the base keeps its bits."""
    base = half_layer(torch.bfloat16)
    before = bits(base.weight)
    adapter = trained(adapter_of(TRANSFORMS[-2], RESIDUALS[-1])).float()
    merged, record = merge_layer(f"{BLOCK}.x", base.weight, [(adapter, -0.5)])
    assert merged.dtype == torch.float32
    assert not merged.requires_grad
    expected = weight_oracle(base.weight, [(adapter.double(), -0.5)])
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert record.path == f"{BLOCK}.x"
    assert record.relative_change == pytest.approx(relative(expected, base.weight), rel=1e-5)
    assert bits(base.weight) == before
    same, record = merge_layer("y", base.weight, [(adapter, 0.0)])
    assert same is base.weight
    assert record.relative_change == 0
