"""What stands before the normalisations goes into them, and the program's function stays; on the CPU our operators are
torch's, so that this needs no Triton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trexport.models.fused.test_fused import CONFIGS, EXACT, SIZES, made
from trexport.models.architectures import spec_of
from trexport.models.fused import ALL, FuseOptions, fuse_, join_
from trexport.models.fused.join import join_norms_
from trexport.models.fused.norm import GroupNormAct
from trexport.models.model import first_output, random_feeds


class Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **feeds: Tensor) -> Tensor:
        return first_output(self.model, feeds)


@pytest.mark.parametrize("name", ["tiny", "tiny-sdxl", "no-middle"])
def test_a_joined_program_is_the_plain_unet(name: str) -> None:
    config: dict[str, Any] = CONFIGS[name]
    model = made(config)
    feeds = {name: t.double() for name, t in random_feeds(spec_of(config, "fp32"), SIZES).items()}
    with torch.no_grad():
        wanted = first_output(model, feeds)
        fuse_(model, FuseOptions(ALL, kernels="triton"))
        program = torch.export.export(Step(model), (), feeds)
        found = join_(program)  # whose linear layers are too small for it to pay
        got = program.module()(**feeds)
    assert float((got - wanted).norm() / wanted.norm()) < EXACT
    targets = Counter(str(node.target) for node in program.graph.nodes)
    assert found["concatenation"] == targets["trexport.joined_group_norm.default"] - sum(
        node.args[3] is None for node in program.graph.nodes if str(node.target) == "trexport.joined_group_norm.default"
    )
    assert "aten.contiguous.default" not in targets
    upsampled = [node for node in program.graph.nodes if "conv_transpose2d" in str(node.target)]
    assert [node.args[2] for node in upsampled] == [None] * len(
        model.up_blocks[:-1]
    )  # its bias is added by the next norm
    # that of the embedding, none of a map
    cats = [node for node in program.graph.nodes if str(node.target) == "aten.cat.default"]
    assert all(node.meta["val"].dim() == 2 for node in cats)


class _Around(nn.Module):
    """A convolution, a normalisation, and something of what stands between and beside them."""

    def __init__(self, between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = GroupNormAct(nn.GroupNorm(2, channels), silu=True, kernels="triton")
        self.between = between

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        normalised, beside = self.between(self.convolution(x), y)
        return self.norm(normalised), beside


def _twice(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z + y, z * 2


def _cat_of_a_sum(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([z + y, y], 1), y


def _cat_of_a_sum_used_twice(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    both = z + y
    return torch.cat([both, y], 1), both


def _sum_beside_itself(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    both = z + y
    return torch.cat([both, both], 1), y


AROUND = {
    "bias": (lambda z, y: (z, z * 2), 6, {"bias": 1}),
    "sum": (lambda z, y: (z + y, y), 6, {"residual": 1, "bias": 1}),
    "sum, kept": (lambda z, y: (both := z + y, both * 2), 6, {"residual": 1, "bias": 1}),
    "other side": (lambda z, y: (y + z, y), 6, {"residual": 1, "bias": 1}),
    "the bias is needed elsewhere": (_twice, 6, {"residual": 1}),
    "concatenation": (lambda z, y: (torch.cat([z, y], 1), y), 12, {"concatenation": 1, "bias": 1}),
    "the other order": (lambda z, y: (torch.cat([y, z], 1), y), 12, {"concatenation": 1}),
    "sum and concatenation": (_cat_of_a_sum, 12, {"concatenation": 1, "residual": 1, "bias": 1}),
    "the sum is needed elsewhere": (_cat_of_a_sum_used_twice, 12, {"concatenation": 1}),
    "twice itself": (lambda z, y: (z + z, y), 6, {"residual": 1}),
    "itself beside it": (lambda z, y: (torch.cat([z, z], 1), y), 12, {"concatenation": 1}),
    "a sum beside itself": (_sum_beside_itself, 12, {"concatenation": 1}),
    "three parts": (lambda z, y: (torch.cat([z, y, y], 1), y), 18, {}),
    "another axis": (lambda z, y: (torch.cat([z, y], 2), y), 6, {}),
    "a number": (lambda z, y: (z + 3, y), 6, {}),
    "broadcast": (lambda z, y: (z + y[:1], y), 6, {}),
    "scaled": (lambda z, y: (torch.add(z, y, alpha=2), y), 6, {}),
    "something else": (lambda z, y: (F.silu(z), y), 6, {}),
}


@pytest.mark.parametrize(("between", "channels", "wanted"), AROUND.values(), ids=AROUND)
def test_only_what_is_the_same_is_joined(
    between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], channels: int, wanted: dict[str, int]
) -> None:
    model = _Around(between, channels).double().eval().requires_grad_(False)
    for parameter in model.norm.parameters():
        parameter += torch.randn_like(parameter)
    inputs = (torch.randn(3, 4, 5, 7).double(), torch.randn(3, 6, 5, 7).double())
    with torch.no_grad():
        plain = model(*inputs)
        program = torch.export.export(model, inputs)
        assert join_norms_(program) == wanted
        joined = program.module()(*inputs)
    for got, expected in zip(joined, plain, strict=True):
        assert float((got - expected).abs().max()) < 1e-12
