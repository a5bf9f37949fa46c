"""Linear layers with a weight for every sample, against a loop over the samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trexport.errors import UsageError
from trexport.models.bank import Choice, bank_


class Two(nn.Module):
    """A layer inside of a list, as diffusers' `to_out.0`, and one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(6, 4)])
        self.outer = nn.Linear(4, 3, bias=False)
        self.convolution = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner[0](x))


@pytest.mark.parametrize("between", [(), (5,), (2, 3)])
def test_every_sample_takes_its_own_weight(between: tuple[int, ...]) -> None:
    model = Two().double()
    names = ["inner.0.weight", "outer.weight"]
    weights = {name: torch.randn(4, *model.get_parameter(name).shape, dtype=torch.float64) for name in names}
    bias = model.get_parameter("inner.0.bias")
    index, strength = torch.tensor([0, 3, 1, 3, 2]), torch.tensor([1.0, 1.0, -0.7, 0.3, 0.0])
    x = torch.randn(5, *between, 6, dtype=torch.float64)
    choice = Choice()
    bank_(model, names, choice)
    with torch.no_grad(), choice.of(index, strength, weights):
        found = model(x)
    assert found.shape == (5, *between, 3)
    for row, (place, s) in enumerate(zip(index.tolist(), strength.double().tolist(), strict=True)):
        inner, outer = (w[0] + s * (w[place] - w[0]) for w in weights.values())
        torch.testing.assert_close(found[row], F.linear(F.linear(x[row], inner, bias), outer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_at_full_strength_and_at_none_the_weight_is_the_places_to_the_bit(dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 4, bias=False, dtype=dtype)
    model = nn.Sequential(linear)
    weights = {"0.weight": torch.randn(3, 4, 6).to(dtype)}
    choice = Choice()
    bank_(model, weights, choice)
    eye = torch.eye(6, dtype=dtype).expand(4, 6, 6)
    with torch.no_grad(), choice.of(torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0]), weights):
        found = model(eye)
    for row, place in enumerate((0, 1, 2, 0)):
        assert torch.equal(found[row].T, weights["0.weight"][place])


def test_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="convolution: a Conv2d"):
        bank_(Two(), ["convolution.weight"], Choice())
