"""What the kernel leaves to torch, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import trained
from trlora import AdapterSpec, LayerAdapter
from trlora.swap.plan import Plan, plan_of
from trlora.swap.variant import Variant, free_splits

RING = {"type": "tensor_ring", "rank": 2}


def adapter(columns: int = 128, rows: int = 24, **parts: object) -> LayerAdapter:
    spec = AdapterSpec.from_dict(parts)
    return trained(LayerAdapter.from_spec(spec, columns, rows, torch.Generator().manual_seed(1))).float()


def plan(weight: Tensor, *adapters: LayerAdapter, buffer: Tensor | None = None, why_not: str | None = None) -> Plan:
    buffers = {"layer": weight if buffer is None else buffer}
    return plan_of({"layer": weight}, buffers, [{"layer": item} for item in adapters], why_not)


def half(rows: int = 24, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns).half()


@pytest.mark.parametrize(
    ("planned", "reason"),
    [
        (lambda: plan(half().float(), adapter(transform=RING)), "weights in float32"),
        (lambda: plan(half(128, 24).T, adapter(transform=RING)), "a weight that is not contiguous"),
        (lambda: plan(half(), adapter(transform=RING), buffer=half(128, 24).T), "a weight that is not contiguous"),
        (lambda: plan(half(), adapter(residual=RING, magnitude={"type": "scale"})), "a magnitude"),
        (lambda: plan(half(24, 36), adapter(36, transform=RING)), "TensorRingTransform of 36 columns"),
        (lambda: plan(half(24, 36), adapter(36, residual={"type": "low_rank"})), "rows of 36 columns"),
        (
            lambda: plan(half(24, 640), adapter(640, transform={"type": "householder", "rank": 2})),
            "HouseholderTransform of 640 columns",
        ),
        (
            lambda: plan(half(256, 256), adapter(256, 256, residual={"type": "low_rank", "rank": 130})),
            "a residual of rank 130",
        ),
        (
            lambda: plan(half(24, 640), *[adapter(640, transform=RING) for _ in range(5)]),
            "no kernel for 640 columns cut at 64, 5 adapters, 20 terms",
        ),
        (
            lambda: plan(
                half(24, 256),
                adapter(256, transform={**RING, "modes": [4, 4, 16]}),
                adapter(256, transform={**RING, "modes": [8, 8, 4]}),
            ),
            "TensorRingTransform of 256 columns",
        ),
        (lambda: plan(half(), adapter(transform=RING), why_not="no GPU"), "no GPU"),
    ],
)
def test_what_the_kernel_does_not_take_has_a_reason(planned, reason: str) -> None:
    found = planned()
    assert found.torch == {"layer": reason}
    assert not found.groups


def test_layers_of_one_width_go_together() -> None:
    weights = {"a": half(), "b": half(40), "c": half(24, 64), "d": half(), "e": half()}
    adapters = {
        "a": adapter(transform=RING, residual=RING),
        "b": adapter(rows=40, transform=RING),
        "c": adapter(64, transform=RING),
        "d": adapter(residual=RING),
    }
    found = plan_of(weights, weights, [adapters])
    assert sorted(sorted(group.paths) for group in found.groups) == [["a", "d"], ["b"], ["c"]]
    assert found.unchanged == ["e"]
    assert not found.torch


@pytest.mark.parametrize("stride", [16, 320, 640, 2560, 2880, 5120, 11520])
def test_rows_without_a_transform_are_taken_in_pieces(stride: int) -> None:
    width, n_lo = next(free_splits(stride))
    fitted = Variant(stride, width, n_lo, False, low_rank_steps=(1,)).fitted()
    assert fitted is not None
    assert fitted.pieces * width == stride


def test_a_variant_never_asks_for_more_memory_than_there_is() -> None:
    wide = Variant(2048, 2048, 128, False, terms=(4,), low_rank_steps=(3,))
    assert wide.fitted() is None
    fitted = wide.fitted(227 * 1024)
    assert fitted is not None
    assert 99 * 1024 < fitted.shared_bytes <= 227 * 1024
