"""Files of kohya's scripts and of LyCORIS, against LyCORIS' own modules and diffusers' own loader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from tests.trexport.helpers import leftovers, run_cli
from trexport.errors import AdapterWarning
from trexport.formats import read_adapter
from trexport.formats.kohya.names import dotted
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trlora import CheckpointError, adapted_weight

PATH, NAME = "mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(20, 12),
    "conv 1x1": lambda: nn.Conv2d(20, 12, 1),
    "conv 3x3": lambda: nn.Conv2d(20, 12, 3, padding=1),
}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LoConModule, {"lora_dim": 3, "alpha": 2}),
    "LoCon, Tucker": (LoConModule, {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "DoRA": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "LoHa": (LohaModule, {"lora_dim": 3, "alpha": 2}),
    "LoHa, Tucker": (LohaModule, {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "LoKr, W2 factored": (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 4}),
    "LoKr, both factored": (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 4, "decompose_both": True}),
    "LoKr, whole": (LokrModule, {"lora_dim": 1000, "alpha": 2, "factor": 4}),
    "LoKr, Tucker": (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 4, "use_tucker": True}),
    "LoKr with norms": (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 4, "weight_decompose": True}),
    "(IA)³ of inputs": (IA3Module, {"train_on_input": True}),
    "(IA)³ of outputs": (IA3Module, {}),
    "full": (FullModule, {}),
}


def trained(kind: Any, fields: dict[str, Any], layer: nn.Module) -> Any:
    """A module of LyCORIS with random parameters."""
    module = kind(NAME, layer, **fields)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "org_module" not in name and name not in ("dora_scale", "bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        if hasattr(module, "dora_scale"):
            module.dora_scale.mul_(1 + 0.2 * torch.rand(module.dora_scale.shape))
    return module


def state_of(module: Any) -> dict[str, Tensor]:
    """As LyCORIS saves it."""
    if isinstance(module, FullModule):  # until it is applied its weight is the difference, which it saves afterwards
        return {f"{NAME}.diff": module.weight.detach().clone(), f"{NAME}.diff_b": torch.zeros(12)}
    own = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
    state = own or {k: v for k, v in module.state_dict().items() if not k.startswith(("org_module", "scalar"))}
    return {f"{NAME}.{key}": value.detach().clone().contiguous() for key, value in state.items()}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_layer_draws_what_lycoris_draws(method: str, layer: str, tmp_path: Path) -> None:
    """LyCORIS' forward, which adapters are trained with: its `get_merged_weight` (4.1.3) scales LoHa and LoKr by alpha / r
    twice."""
    made = LAYERS[layer]()
    kind, fields = METHODS[method]
    module = trained(kind, fields, made).eval()
    safetensors.torch.save_file(state_of(module), tmp_path / "file.safetensors")
    adapter = read_adapter(tmp_path / "file.safetensors")
    assert adapter.format == ("kohya" if kind is LoConModule else "LyCORIS")
    assert isinstance(made.weight, Tensor)
    weight = made.weight.detach().clone()
    bound = adapter.bind({PATH: tuple(weight.shape)})[PATH]
    x = torch.randn(5, 20) if weight.ndim == 2 else torch.randn(2, 20, 5, 4)
    merged = copy.deepcopy(made)
    with torch.no_grad():
        plain = made(x)
        merged.weight.copy_(adapted_weight(weight, [(bound, 1.0)], torch.float64))  # type: ignore[operator]
        module.apply_to()
        expected = made(x)
        found = merged(x)
    assert (expected - plain).norm() > 0.02 * plain.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
    with pytest.warns(AdapterWarning, match="3 tensors for text_encoder are left out"):
        (adapter,) = open_adapters([str(file)], base)
    assert len(adapter.layers) == 1
    assert run_cli(["merge", "random:tiny", file, "-o", tmp_path / "out"]) == 0
    assert "warning: " in capsys.readouterr().err
    assert run_cli(["inspect", file]) == 0
    assert "text_encoder" in capsys.readouterr().out
    safetensors.torch.save_file(text, file)
    with pytest.raises(CheckpointError, match="nothing for the UNet inside: 3 tensors"):
        read_adapter(file)


def without(leaf: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(f"{QUERY}.{leaf}")


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("lora_up.weight"), "lora_up.weight is missing"),
        (without("lora_down.weight"), "lora_down.weight is missing"),
        (without("alpha"), "1 of 2 layers have no alpha"),
        (put(f"{QUERY}.hada_w1_a", torch.ones(1, 1)), "beside"),
        (put(f"{QUERY}.oft_blocks", torch.ones(1, 2, 2)), "turns the outputs"),
        (put("lora_unet_mid_block_norm.w_norm", torch.ones(4)), "normalisations"),
        (put("lora_unet_mid_block_x.diff_b", torch.ones(4)), "diff is missing"),
        (put("base_model.unet.x", torch.ones(1)), "1 of 7 keys are none of kohya's"),
        (put(f"{QUERY}.lora_up.weight", torch.full((16, 2), torch.nan)), "finite"),
        (put(f"{QUERY}.lora_up.weight", torch.ones(16, 2).to(torch.float8_e4m3fn)), "float8"),
        (put(f"{QUERY}.dora_scale", torch.ones(1, 16)), "norms of the inputs"),
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
