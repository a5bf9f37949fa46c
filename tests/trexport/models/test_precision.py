"""What float16 cannot hold is found, wherever it is computed, and named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trexport.models.precision import CLOSE_IN_HALF, fails_in_half
from trexport.parity.tolerance import TOLERANCES


class Chain(nn.Module):
    """Two layers and, between them, a sum that no module computes."""

    def __init__(self, weight: float | None = None, added: float = 0.0) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        if weight is not None:
            self.one.weight.data.fill_(weight)
        self.added = added

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.one(x)
        hidden = (hidden + self.added) - self.added
        return (self.two(torch.tanh(hidden)),)


X = [torch.linspace(-1, 1, 8).reshape(2, 4), torch.ones(1, 4)]


def test_what_fits_passes_and_keeps_its_bits() -> None:
    model = Chain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fails_in_half(model, X) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "tensor", "operator"),
    [
        (Chain(weight=5e4), "one", "addmm"),  # a layer's output
        (Chain(added=7e4), "", "add"),  # a sum between layers
        (Chain(weight=1e6), "one.weight", "parameter"),
        (Chain(added=math.nan), "", "add"),
    ],
)
def test_the_first_overflow_is_named(model: Chain, tensor: str, operator: str) -> None:
    verdict = fails_in_half(model, X)
    assert verdict is not None
    assert verdict.overflow is not None
    assert (verdict.overflow.tensor, verdict.overflow.operator) == (tensor, operator)
    assert not verdict.overflow.max_abs <= 65504
    assert f"{verdict.overflow.max_abs:.3g}" in verdict.reason


def test_what_loses_its_digits_is_refused_without_an_overflow() -> None:
    verdict = fails_in_half(Chain(added=3e4), X)
    assert verdict is not None
    assert verdict.overflow is None
    assert "relative L2" in verdict.reason


def test_it_is_no_looser_than_validate() -> None:
    assert TOLERANCES["fp16"].relative_l2 >= CLOSE_IN_HALF
