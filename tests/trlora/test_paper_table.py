"""The budgets of arXiv 2501.08727 on Stable Diffusion 1.5: every attention projection of its UNet."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel  # type: ignore[attr-defined]
from torch import nn

from trlora import AdapterSpec, LayerAdapter, find_targets, inject_, remove_, shapes_of
from trlora.training import trainable_parameters

RING_2 = {"type": "tensor_ring", "order": 3, "rank": 2}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def test_the_base_is_that_of_stable_diffusion_15(unet: nn.Module) -> None:
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


def test_the_targets_are_the_attention_projections_of_16_blocks(unet: nn.Module) -> None:
    found = find_targets(unet)
    assert len(found) == 128
    assert Counter(path.split(".attn")[1][2:] for path in found) == {
        leaf: 32 for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert len({path.split(".attn")[0] for path in found}) == 16
    assert len(find_targets(unet, "transformer")) == 128 + 2 * 16


@pytest.mark.parametrize(
    ("transform", "residual", "parameters"),
    [
        ({"type": "identity"}, {"type": "low_rank", "rank": 4}, 797_184),
        (RING_2, {"type": "low_rank", "rank": 4}, 941_440),
        (RING_2, {"type": "tensor_ring", "order": 3, "rank": 6}, 400_288),
        (RING_2, {"type": "none"}, 941_440 - 797_184),
    ],
    ids=["LoRA(4)", "TLoRA*(2,4)", "TLoRA(2,6)", "TRM(2)"],
)
def test_the_budgets(unet: nn.Module, transform: dict[str, Any], residual: dict[str, Any], parameters: int) -> None:
    spec = AdapterSpec.from_dict({"transform": transform, "residual": residual})
    try:
        assert len(inject_(unet, spec)) == 128
        assert sum(parameter.numel() for parameter in trainable_parameters(unet)) == parameters
    finally:
        remove_(unet)


def test_the_modes_of_every_layer(unet: nn.Module) -> None:
    modes = {320: (4, 8, 10), 640: (8, 8, 10), 768: (8, 8, 12), 1280: (8, 10, 16)}
    spec = AdapterSpec.from_dict({"transform": RING_2, "residual": {"type": "tensor_ring", "rank": 6}})
    targets, widths = find_targets(unet), set()
    for rows, columns in {shape for path, shape in shapes_of(unet).items() if path in targets}:
        adapter = LayerAdapter.from_spec(spec, columns, rows, torch.Generator().manual_seed(0))
        shapes = {name: tuple(parameter.shape) for name, parameter in adapter.named_parameters()}
        assert [shapes[f"transform.core.{d}"] for d in range(3)] == [(m, m, 2, 2) for m in modes[columns]]
        assert [shapes[f"residual.row_core.{d}"] for d in range(3)] == [(m, 6, 6) for m in modes[rows]]
        assert [shapes[f"residual.column_core.{d}"] for d in range(3)] == [(m, 6, 6) for m in modes[columns]]
        widths |= {rows, columns}
    assert widths == set(modes)
