"""What follows a linear layer goes into its product, and the program's function stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trexport.models.fused.test_fused import CONFIGS, EXACT, SIZES, made
from tests.trexport.models.fused.test_join import Step
from trexport.models.architectures import spec_of
from trexport.models.fused import FuseOptions, fuse_
from trexport.models.fused.join_linear import join_linears_
from trexport.models.model import first_output, random_feeds


@pytest.mark.parametrize("name", ["tiny", "tiny-sdxl"])
def test_a_joined_program_is_the_plain_unet(name: str) -> None:
    model = made(CONFIGS[name])
    feeds = {name: t.double() for name, t in random_feeds(spec_of(CONFIGS[name], "fp32"), SIZES).items()}
    with torch.no_grad():
        wanted = first_output(model, feeds)
        fuse_(model, FuseOptions(kernels="triton"))
        blocks = sum(name.endswith(".ff") for name, _ in model.named_modules())
        program = torch.export.export(Step(model), (), feeds)
        found = join_linears_(program, lambda rows, inputs, outputs: True)
        got = program.module()(**feeds)
    assert float((got - wanted).norm() / wanted.norm()) < EXACT
    # SDXL's conditions are added to the time embedding
    assert found == {"geglu": blocks, "sum": 3 * blocks + ("sdxl" in name)}


def test_it_is_left_where_it_does_not_pay() -> None:
    model = made(CONFIGS["tiny"])
    feeds = random_feeds(spec_of(CONFIGS["tiny"], "fp32"), SIZES)
    asked: list[tuple[int, int, int]] = []
    with torch.no_grad():
        program = torch.export.export(Step(model.float()), (), feeds)
        assert join_linears_(program, lambda *sizes: asked.append(sizes) or False) == {}  # type: ignore[func-returns-value]
    assert {type(size) for sizes in asked for size in sizes} == {int}
    rows = {sizes[0] for sizes in asked}
    assert SIZES["batch_size"] * SIZES["height"] * SIZES["width"] in rows


class _Around(nn.Module):
    def __init__(self, after: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 8)
        self.after = after

    def forward(self, x: Tensor, y: Tensor) -> object:
        return self.after(self.linear(x), y)


def _gated(z: Tensor, y: Tensor) -> Tensor:
    values, gates = z.chunk(2, -1)
    return values * F.gelu(gates)


def _gated_other_order(z: Tensor, y: Tensor) -> Tensor:
    values, gates = z.chunk(2, dim=2)
    return F.gelu(gates) * values


def _gates_first(z: Tensor, y: Tensor) -> Tensor:
    gates, values = z.chunk(2, -1)
    return values * F.gelu(gates)


def _tanh(z: Tensor, y: Tensor) -> Tensor:
    values, gates = z.chunk(2, -1)
    return values * F.gelu(gates, approximate="tanh")


def _of_rows(z: Tensor, y: Tensor) -> Tensor:
    values, gates = z.chunk(2, 1)
    return values * F.gelu(gates)


def _squared(z: Tensor, y: Tensor) -> Tensor:
    values, _ = z.chunk(2, -1)
    return values * F.gelu(values)


def _gates_used(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    values, gates = z.chunk(2, -1)
    return values * F.gelu(gates), gates


AROUND: dict[str, tuple[Callable[[Tensor, Tensor], object], dict[str, int]]] = {
    "sum": (lambda z, y: z + y, {"sum": 1}),
    "other side": (lambda z, y: y + z, {"sum": 1}),
    "sum, kept": (lambda z, y: (both := z + y, both * 2), {"sum": 1}),
    "dropped out": (lambda z, y: F.dropout(z, 0.3, training=False) + y, {"sum": 1}),
    "needed elsewhere": (lambda z, y: (z + y, z * 2), {}),
    "twice itself": (lambda z, y: z + z, {}),
    "a number": (lambda z, y: z + 3, {}),
    "broadcast": (lambda z, y: z + y[:1], {}),
    "scaled": (lambda z, y: torch.add(z, y, alpha=2), {}),
    "gated": (_gated, {"geglu": 1}),
    "gated, other order": (_gated_other_order, {"geglu": 1}),
    "gates first": (_gates_first, {}),
    "tanh": (_tanh, {}),
    "halves of rows": (_of_rows, {}),
    "one half twice": (_squared, {}),
    "gates used": (_gates_used, {}),
}


@pytest.mark.parametrize(("after", "wanted"), AROUND.values(), ids=AROUND)
def test_only_what_is_the_same_is_joined(after: Callable[[Tensor, Tensor], object], wanted: dict[str, int]) -> None:
    model = _Around(after).double().eval().requires_grad_(False)
    inputs = (torch.randn(3, 4, 5).double(), torch.randn(3, 4, 8).double())
    with torch.no_grad():
        plain = model(*inputs)
        program = torch.export.export(model, inputs)
        assert join_linears_(program, lambda rows, inputs, outputs: True) == wanted
        joined = program.module()(*inputs)
    pairs = zip(joined, plain, strict=True) if isinstance(plain, tuple) else [(joined, plain)]
    for got, expected in pairs:
        assert float((got - expected).abs().max()) < 1e-12
