"""Names and wrong input of kohya's files, against diffusers' own loader; for what LyCORIS draws see `test_lycoris`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from torch import Tensor

from tests.trexport.helpers import leftovers, run_cli
from trexport.errors import AdapterWarning
from trexport.formats import read_adapter
from trexport.formats.kohya.names import dotted
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trlora import CheckpointError


@pytest.mark.parametrize("source", ["random:sd15", "random:sdxl"])
def test_every_path_of_a_unet_comes_back(source: str) -> None:
    for path in open_base(source).weight_shapes():
        assert dotted(path.replace(".", "_")) == path


ATTENTION = ("proj_in", "proj_out", "transformer_blocks_1_attn1_to_q", "transformer_blocks_0_attn2_to_out_0")
FEED_FORWARD = ("transformer_blocks_1_ff_net_0_proj", "transformer_blocks_1_ff_net_2")
RESNET = ("in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection")


def test_names_of_the_original_sdxl_are_those_of_diffusers() -> None:
    base = open_base("random:sdxl")
    inner = {f"input_blocks_{n}_1": (*ATTENTION, *FEED_FORWARD) for n in (4, 5, 7, 8)}
    inner |= {f"output_blocks_{n}_1": (*ATTENTION, *FEED_FORWARD) for n in range(6)}
    inner |= {"middle_block_1": (*ATTENTION, *FEED_FORWARD)}
    inner |= {f"input_blocks_{n}_0": RESNET for n in (4, 7)} | {f"output_blocks_{n}_0": RESNET for n in range(9)}
    inner |= {"middle_block_0": RESNET[:3], "middle_block_2": RESNET[:3]}
    inner |= {"input_blocks_3_0": ("op",), "input_blocks_6_0": ("op",), "output_blocks_2_2": ("conv",)}
    shapes = base.weight_shapes()
    names = [f"{block}_{part}" for block, parts in inner.items() for part in parts]
    assert all(dotted(name) in shapes for name in names)
    config = type("Config", (), {"layers_per_block": 2})()
    given = {f"lora_unet_{name}.lora_down.weight": torch.tensor(n) for n, name in enumerate(names) if "attn" in name}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(given), config)
    for key, number in mapped.items():
        path = key.removeprefix("lora_unet_").removesuffix(".lora_down.weight")
        for original, own in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            path = path.replace(original, own)  # diffusers does it in another place
        assert dotted(path) == dotted(names[int(number)])
    assert {dotted(name) for name in ("time_embed_0", "label_emb_0_2", "input_blocks_0_0", "out_2")} <= shapes.keys()


def pair(name: str, rows: int, columns: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.randn(rank, columns),
        f"{name}.lora_up.weight": torch.randn(rows, rank),
        f"{name}.alpha": torch.tensor(1.0),
    }


QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def test_what_is_for_a_text_encoder_is_said(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 8)
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(pair(QUERY, 16, 16) | text, file)
    with pytest.warns(AdapterWarning, match="adapters of 1 layers of text_encoder are left out"):
        (adapter,) = open_adapters([str(file)], base)
    assert len(adapter.layers) == 1
    assert run_cli(["merge", "random:tiny", file, "-o", tmp_path / "out"]) == 0
    assert "warning: " in capsys.readouterr().err
    assert run_cli(["inspect", file]) == 0
    assert "text_encoder" in capsys.readouterr().out
    safetensors.torch.save_file(text, file)
    with pytest.raises(CheckpointError, match="nothing for the UNet or transformer inside, adapters of 1 layers"):
        open_adapters([str(file)], base)


def without(leaf: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(f"{QUERY}.{leaf}")


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def twice(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({f"{name}.b_norm": torch.ones(4) for name in names})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("lora_up.weight"), "lora_up.weight is missing"),
        (without("lora_down.weight"), "lora_down.weight is missing"),
        (without("alpha"), "1 of 2 layers have no alpha"),
        (put(f"{QUERY}.hada_w1_a", torch.ones(1, 1)), "beside"),
        (put(f"{QUERY}.oft_blocks", torch.ones(1, 2, 2)), "beside"),
        (put("lora_unet_mid_block_norm.w_norm", torch.ones(4, 4)), "one dimension"),
        (put("base_model.unet.x", torch.ones(1)), "1 of 7 keys are none of kohya's"),
        (put(f"{QUERY}.lora_up.weight", torch.full((16, 2), torch.nan)), "finite"),
        (put(f"{QUERY}.lora_up.weight", torch.ones(16, 2).to(torch.float8_e4m3fn)), "float8"),
        (put(f"{QUERY}.dora_scale", torch.ones(1, 16)), "norms of the inputs"),
        (put(f"{QUERY.replace('lora_unet_', 'lycoris_')}.alpha", torch.tensor(1.0)), "are one module"),
        (twice("lora_te_encoder_layers_0_norm", "lora_te1_encoder_layers_0_norm"), "are one module"),
        (twice("lora_unet_input_blocks_4_1_norm", "lora_unet_down_blocks_1_attentions_0_norm"), "are both down_blocks"),
        (put("oft_unet_mid_block_attentions_0_proj_in.alpha", torch.tensor(0.0)), "turns nothing"),
        (put(f"{QUERY}.lora_mid.weight", torch.ones(3, 3, 3, 3)), "expected \\(r, r, height, width\\)"),
    ],
)
def test_wrong_input(
    damage: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = pair(QUERY, 16, 16) | pair(QUERY.replace("to_q", "to_k"), 16, 16)
    damage(tensors)
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=says):
        read_adapter(file)
    assert run_cli(["merge", "random:tiny", file, "-o", tmp_path / "out"]) == 1
    assert capsys.readouterr().err
    assert leftovers(tmp_path) == ["a.safetensors"]
