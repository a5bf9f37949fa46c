"""A traced function computes what the function does, with fewer operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trlora.training.traced import traced


def views(x: Tensor, y: Tensor) -> Tensor:
    """Several in a row, of a transposed tensor too, some that change nothing."""
    a = x.view(6, 4).view(2, 12).view(2, 3, 4).expand(2, 3, 4)
    b = y.transpose(0, 1).unsqueeze(0).view(1, 3, 4).view(3, 4).expand(2, 3, 4)
    return torch.matmul(a, b.transpose(1, 2)).reshape(2, 9)


def in_place(x: Tensor, y: Tensor) -> Tensor:
    out = x.clone()
    out.view(6, 4).view(24).view(6, 4)[1:3] = 7.0
    return out * y.sum()


def unused(x: Tensor, y: Tensor) -> Tensor:
    _ = x @ y.T.reshape(4, 3) @ torch.ones(3, 2)
    return x * 2


def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Any, ...] = torch.func.vjp(lambda a, b: torch.vmap(torch.mul)(views(a, b), views(a, b)), x, y)
    return found[1](torch.ones_like(found[0]))


@pytest.mark.parametrize("function", [views, in_place, unused, gradients])
def test_the_program_computes_what_the_function_does(function: Callable[..., Any]) -> None:
    x, y = torch.randn(6, 4), torch.randn(4, 3)
    with torch.no_grad():
        program = traced(function, torch.zeros(6, 4), torch.ones(4, 3))
        torch.testing.assert_close(program(x, y), function(x, y))


def test_what_is_not_needed_is_not_computed() -> None:
    with torch.no_grad():
        program = traced(unused, torch.zeros(6, 4), torch.ones(4, 3))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.mul.Tensor"]


def test_of_views_in_a_row_the_last_is_left() -> None:
    with torch.no_grad():
        program = traced(lambda x: x.view(6, 4).view(24).view(2, 12).expand(2, 12) + 1, torch.zeros(4, 6))
    found = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert found == ["aten.view.default", "aten.add.Tensor"]
