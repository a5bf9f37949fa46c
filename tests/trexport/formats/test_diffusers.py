"""LoRA files of diffusers and of kohya, against what diffusers makes of them: `load_lora_weights` and `fuse_lora`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from trexport.errors import AdapterWarning
from trexport.formats import read_adapter
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import load_model, merge_into_
from trlora import CheckpointError

Tensors = dict[str, Tensor]
LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
]
CONVOLUTION = "down_blocks.0.resnets.0.conv1"


def pairs(base: Base, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path → A and B, of rank 2."""
    shapes = base.weight_shapes()
    return {
        path: (
            torch.randn(2, *shapes[path][1:]),
            0.2 * torch.randn(shapes[path][0], 2, *(1 for _ in shapes[path][2:])),
        )
        for path in layers
    }


def new(base: Base) -> tuple[Tensors, dict[str, str]]:
    found: Tensors = {}
    for path, (a, b) in pairs(base, [*LAYERS, CONVOLUTION]).items():
        found |= {f"unet.{path}.lora_A.weight": a, f"unet.{path}.lora_B.weight": b}
    return found, {}


def with_config(base: Base) -> tuple[Tensors, dict[str, str]]:
    fields = {
        "unet.r": 2,
        "unet.lora_alpha": 5,
        "unet.alpha_pattern": {LAYERS[0]: 3},
        "unet.rank_pattern": {},
        "unet.target_modules": [*LAYERS, CONVOLUTION],
    }
    return new(base)[0], {"lora_adapter_metadata": json.dumps(fields), "format": "pt"}


def old(base: Base) -> tuple[Tensors, dict[str, str]]:
    """Of attention processors."""
    found: Tensors = {}
    for path, (a, b) in pairs(base, LAYERS).items():
        module, _, name = path.removesuffix(".0").rpartition(".")
        key = f"unet.{module}.processor.{name}_lora"
        found |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    return found, {}


def older(base: Base) -> tuple[Tensors, dict[str, str]]:
    return {key.removeprefix("unet."): tensor for key, tensor in old(base)[0].items()}, {}


def linear_layer(base: Base) -> tuple[Tensors, dict[str, str]]:
    found: Tensors = {}
    for path, (a, b) in pairs(base, LAYERS).items():
        found |= {f"unet.{path}.lora.down.weight": a, f"unet.{path}.lora.up.weight": b}
    return found, {}


def kohya(base: Base) -> tuple[Tensors, dict[str, str]]:
    found: Tensors = {}
    for path, (a, b) in pairs(base, [*LAYERS, CONVOLUTION]).items():
        name = "lora_unet_" + path.replace(".", "_")
        found |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.5)}
    return found, {"ss_network_dim": "2"}


@pytest.mark.parametrize("written", [new, with_config, old, older, linear_layer, kohya])
def test_the_merged_unet_is_that_of_diffusers(
    written: Callable[[Base], tuple[Tensors, dict[str, str]]], base: Base, tmp_path: Path
) -> None:
    tensors, metadata = written(base)
    folder = tmp_path / "lora"
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=metadata or None)
    ours, theirs = load_model(base), cast(Any, copy.deepcopy(load_model(base)))  # diffusers writes into a file's memory
    plain = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    merge_into_(ours, open_adapters([str(folder)], base))
    if written is older:
        tensors = {f"unet.{key}": tensor for key, tensor in tensors.items()}
    state, alphas, *rest = StableDiffusionPipeline.lora_state_dict(  # type: ignore[misc]
        dict(tensors) if not metadata.get("lora_adapter_metadata") else str(folder), return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs, metadata=rest[0] if rest else None)
    theirs.fuse_lora()
    theirs.unload_lora()
    found, expected = ours.state_dict(), theirs.state_dict()
    changed = 0
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(found[name], tensor)
    assert changed == len(tensors) // (3 if written is kohya else 2)


def test_a_text_encoder_is_reported(base: Base, tmp_path: Path) -> None:
    tensors, _ = new(base)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.warns(AdapterWarning, match="1 layers of text_encoder"):
        open_adapters([str(tmp_path / "a.safetensors")], base)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tensors: tensors.pop(f"unet.{LAYERS[0]}.lora_B.weight"), "B is missing"),
        (lambda tensors: tensors.update({"unet.x.y": torch.ones(1)}), "1 of 9 keys"),
        (lambda tensors: tensors.update({f"unet.{LAYERS[0]}.lora_B.weight": torch.ones(16, 2, 1, 1)}), "dimensions"),
    ],
)
def test_wrong_input(damage: Callable[[Tensors], Any], says: str, base: Base, tmp_path: Path) -> None:
    tensors, _ = new(base)
    damage(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=says):
        read_adapter(tmp_path / "a.safetensors")
