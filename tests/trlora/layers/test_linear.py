from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import IN, OUT, RESIDUALS, TRANSFORMS, adapter_of, bits, trained
from trlora import AdaptedLinear, AdapterSpec, LayerAdapter, ShapeError, TargetError
from trlora.residuals import NoResidual
from trlora.transforms import DiagonalTransform


def layer(bias: bool = True) -> AdaptedLinear:
    return AdaptedLinear(nn.Linear(IN, OUT, bias=bias))


def test_it_looks_like_the_linear_layer_it_wraps() -> None:
    """Code that asks an attention projection for its dtype, device or width reads the base's."""
    for bias in (True, False):
        adapted = layer(bias)
        assert (adapted.in_features, adapted.out_features) == (IN, OUT)
        assert adapted.weight is adapted.base.weight
        assert adapted.bias is adapted.base.bias
        assert (adapted.bias is not None) == bias


def test_without_adapters_it_is_the_base() -> None:
    adapted = layer()
    x = torch.randn(2, 3, IN)
    assert bits(adapted(x)) == bits(adapted.base(x))
    assert adapted.merged_weight() is adapted.weight
    assert adapted.active() == []


def test_a_layer_without_bias_is_adapted() -> None:
    adapted = layer(bias=False).double()
    adapted.add("a", trained(adapter_of(TRANSFORMS[6], RESIDUALS[5])), 0.5)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), x @ adapted.merged_weight(torch.float64).T, rtol=1e-11, atol=1e-11)


def test_the_residual_acts_on_the_input_not_on_the_transformed_one() -> None:
    """`W0·T·x + Δ·x`, with one transform and one residual that tell the ways apart."""
    adapted = AdaptedLinear(nn.Linear(3, 2, bias=False))
    spec = AdapterSpec.from_dict({"transform": {"type": "diagonal"}, "residual": {"type": "low_rank", "rank": 1}})
    adapter = LayerAdapter.from_spec(spec, 3, 2)
    values = {
        "transform.scale": [2.0, 3.0, 5.0],
        "residual.lora_A.weight": [[1.0, 10.0, 100.0]],
        "residual.lora_B.weight": [[1.0], [7.0]],
    }
    adapter.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    adapted.base.weight.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    adapted.add("a", adapter, 0.5)
    # scale at strength 0.5: (1.5, 2, 3); delta at 0.5: (55.5, 388.5) for ones
    assert adapted(torch.ones(3)).tolist() == [1.5 + 3 + 55.5, 2 + 388.5]


def test_active_adapters_are_those_of_a_strength_other_than_zero() -> None:
    adapted = layer()
    one, two = adapter_of(TRANSFORMS[1]), adapter_of(TRANSFORMS[6])
    adapted.add("one", one, 0.0)
    adapted.add("two", two, -0.5)
    assert adapted.active() == [(two, -0.5)]
    adapted.set_strength("one", 2)
    assert adapted.active() == [(one, 2.0), (two, -0.5)]


def test_an_adapter_of_another_layer_is_refused() -> None:
    adapted = AdaptedLinear(nn.Linear(OUT, IN))
    with pytest.raises(ShapeError, match=r"'a' is for 45 → 28.*28 → 45"):
        adapted.add("a", adapter_of(TRANSFORMS[1], RESIDUALS[1]))
    assert not adapted.adapters
    assert not adapted.strengths


def test_parts_of_two_widths_are_no_adapter() -> None:
    with pytest.raises(ShapeError, match=r"5.*7"):
        LayerAdapter(AdapterSpec.from_dict({}), DiagonalTransform(torch.ones(5)), NoResidual(7, 3))


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training"])
def test_names_that_no_module_can_have_are_refused(name: str) -> None:
    adapted = layer()
    with pytest.raises(TargetError, match=f"'{name}'"):
        adapted.add(name, adapter_of(TRANSFORMS[1]))
    assert not adapted.adapters
    assert not adapted.strengths


def test_a_name_is_taken_once() -> None:
    adapted = layer()
    first = adapter_of(TRANSFORMS[1])
    adapted.add("a", first, 0.5)
    with pytest.raises(TargetError, match="'a'"):
        adapted.add("a", adapter_of(TRANSFORMS[6]), 0.7)
    assert adapted.active() == [(first, 0.5)]


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength: float) -> None:
    adapted = layer()
    with pytest.raises(ValueError, match="'a'"):
        adapted.add("a", adapter_of(TRANSFORMS[1]), strength)
    assert not adapted.adapters
    adapted.add("a", adapter_of(TRANSFORMS[1]), 0.5)
    with pytest.raises(ValueError, match="'a'"):
        adapted.set_strength("a", strength)
    assert adapted.strengths == {"a": 0.5}


def test_the_strength_of_an_unknown_adapter_is_refused() -> None:
    adapted = layer()
    adapted.add("a", adapter_of(TRANSFORMS[1]))
    with pytest.raises(TargetError, match=r"'b'.*\['a'\]"):
        adapted.set_strength("b", 1.0)
    assert adapted.strengths == {"a": 1.0}


def test_the_dtype_of_an_adapter_is_that_of_its_parameters() -> None:
    assert adapter_of(TRANSFORMS[6], RESIDUALS[0]).dtype == torch.float32
    assert adapter_of(TRANSFORMS[0], RESIDUALS[1]).half().dtype == torch.float16
    assert adapter_of().dtype is None
