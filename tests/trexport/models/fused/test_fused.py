"""A rewritten UNet is the same function, and says where the weights went."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trexport.errors import UsageError
from trexport.models.architectures import RANDOM, spec_of
from trexport.models.fused import ALL, REWRITES, FuseOptions, fuse_
from trexport.models.model import first_output, random_feeds

TINY = RANDOM["tiny"]
# SD2: linear projections, heads of one width, upcast attention (which torch's own attention does not need)
SD2 = TINY | {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True}
# cross-attention in both places of a block, and a middle block without any
CONFIGS = {
    "tiny": TINY,
    "tiny-sdxl": RANDOM["tiny-sdxl"] | {"transformer_layers_per_block": [2, 1]},
    "sd2": SD2,
    "only-cross": TINY | {"only_cross_attention": True},
    "no-middle": TINY | {"mid_block_type": None},
    "activated": TINY | {"time_embedding_act_fn": "gelu"},
}
SIZES = {"batch_size": 3, "height": 8, "width": 12, "sequence_length": 5}
EXACT = 1e-13


def made(config: dict[str, Any]) -> UNet2DConditionModel:
    """A model in float64 whose every parameter counts, the biases and normalisations too."""
    model = UNet2DConditionModel.from_config(config)
    assert isinstance(model, UNet2DConditionModel)
    nn.Module.double(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def drawn(model: nn.Module, config: dict[str, Any]) -> Tensor:
    feeds = random_feeds(spec_of(config, "fp32"), SIZES)
    with torch.inference_mode():
        return first_output(model, {name: tensor.double() for name, tensor in feeds.items()})


@pytest.mark.parametrize("rewrites", [*[(name,) for name in REWRITES], ALL], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_function_is_the_same(config: dict[str, Any], rewrites: tuple[str, ...]) -> None:
    model = made(config)
    wanted = drawn(model, config)
    report = fuse_(model, FuseOptions(rewrites))
    linear_already = bool(config.get("use_linear_projection"))
    assert all(
        outcome.replaced or (name == "projection" and linear_already) for name, outcome in report.outcomes.items()
    )
    assert not any(outcome.left for outcome in report.outcomes.values())
    assert float((drawn(model, config) - wanted).norm() / wanted.norm()) < EXACT


def test_no_linear_layer_is_lost_and_rows_are_where_they_are_said_to_be() -> None:
    model = made(TINY)
    before = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = fuse_(model)
    after = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert report.placements.keys() == before.keys() - after
    parameters = dict(model.named_parameters())
    for path, rows in report.placements.items():
        assert torch.equal(parameters[rows.constant][rows.first : rows.first + rows.rows], before[path].weight)
    covered = {rows.constant: 0 for rows in report.placements.values()}
    for rows in report.placements.values():
        covered[rows.constant] += rows.rows
    assert covered == {name: len(parameters[name]) for name in covered}


def test_the_counts_are_those_of_the_model() -> None:
    model = made(TINY)
    resnets = sum(type(module).__name__ == "ResnetBlock2D" for module in model.modules())
    attentions = sum(type(module).__name__ == "Attention" for module in model.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    outcomes = fuse_(model).outcomes
    assert outcomes["self_attention"].replaced == outcomes["cross_attention"].replaced == attentions // 2
    assert outcomes["projection"].replaced == attentions // 2
    assert outcomes["time_embedding"].replaced == resnets
    assert outcomes["group_norm"].replaced == norms
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())


UNKNOWN = {
    "scale-shift": (TINY | {"resnet_time_scale_shift": "scale_shift"}, {"time_embedding", "group_norm"}),
    "other-blocks": (
        TINY | {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
        {"cross_attention", "time_embedding", "group_norm"},
    ),
    "mish": (TINY | {"act_fn": "mish"}, {"time_embedding", "group_norm"}),
    "projected-text": (TINY | {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}, {"cross_attention"}),
}


@pytest.mark.parametrize(("config", "left"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_left_alone_and_counted(config: dict[str, Any], left: set[str]) -> None:
    model = made(config)
    wanted = drawn(model, config)
    report = fuse_(model)
    assert {name for name, outcome in report.outcomes.items() if outcome.left} == left
    assert float((drawn(model, config) - wanted).norm() / wanted.norm()) < EXACT


def test_an_attention_mask_masks_as_before() -> None:
    model = made(TINY)
    feeds = {name: tensor.double() for name, tensor in random_feeds(spec_of(TINY, "fp32"), SIZES).items()}
    mask = torch.tensor([[1, 1, 0, 1, 0]] * 3)
    arguments = (feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"])
    with torch.inference_mode():
        plain = model(*arguments).sample
        wanted = model(*arguments, encoder_attention_mask=mask).sample
        fuse_(model)
        got = model(*arguments, encoder_attention_mask=mask).sample
    assert float((plain - wanted).norm() / wanted.norm()) > 1e-6
    assert float((got - wanted).norm() / wanted.norm()) < EXACT


def test_an_unknown_rewrite_is_named() -> None:
    with pytest.raises(UsageError, match="self_atention: unknown rewrite, expected one of .*self_attention"):
        fuse_(made(TINY), FuseOptions(("self_atention",)))
