"""Files of LyCORIS, every method of it, against its own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from trexport.formats import method_of, read_adapter
from trlora import adapted_weight

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
    "OFT": (DiagOFTModule, {"lora_dim": 3}),
    "OFT, constrained": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.05}),
    "OFT, rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 6}),
    "BOFT, one factor of large blocks": (ButterflyOFTModule, {"lora_dim": 12, "rescaled": True, "constraint": 0.1}),
    "GLoRA": (GLoRAModule, {"lora_dim": 3, "alpha": 2}),
}


def trained(kind: Any, fields: dict[str, Any], layer: nn.Module) -> Any:
    """A module of LyCORIS with random parameters."""
    module = kind(NAME, layer, **fields)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "org_module" not in name and name not in ("dora_scale", "bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape) + (1 if name == "rescale" else 0))
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
    kind, fields = METHODS[method]
    made = LAYERS[layer]()
    check(kind, trained(kind, fields, made), made, tmp_path)


@pytest.mark.parametrize("made", [nn.Linear(20, 24), nn.Conv2d(20, 24, 3, padding=1)], ids=["linear", "conv 3x3"])
def test_a_butterfly_of_three_factors(made: nn.Module, tmp_path: Path) -> None:
    """24 outputs as four blocks of six: 2⁰, 2¹ and 2² halves apart."""
    module = trained(ButterflyOFTModule, {"lora_dim": 6}, made)
    assert module.oft_blocks.shape == (3, 4, 6, 6)
    check(ButterflyOFTModule, module, made, tmp_path)


def test_dylora_is_a_lora_of_all_its_ranks(tmp_path: Path) -> None:
    """Its own forward draws ranks by lot; its file has the keys of a LoRA, and nothing else tells it from one."""
    made = nn.Linear(20, 12)
    module = trained(DyLoraModule, {"lora_dim": 4, "block_size": 2, "alpha": 3}, made)
    safetensors.torch.save_file(state_of(module), tmp_path / "file.safetensors")
    adapter = read_adapter(tmp_path / "file.safetensors")
    assert method_of(adapter) == "LoRA(4)"
    up, down = torch.cat(list(module.up_list), 1), torch.cat(list(module.down_list))
    residual = adapter.layers[PATH].residual
    assert residual is not None
    torch.testing.assert_close(residual.delta(), up @ down * 3 / 4)


def check(kind: Any, module: Any, made: nn.Module, folder: Path) -> None:
    """A layer of LyCORIS and what is read from its file draw the same: by its forward, which adapters are trained with; its
    `get_merged_weight` (4.1.3) scales LoHa and LoKr by alpha / r twice."""
    module.eval()
    safetensors.torch.save_file(state_of(module), folder / "file.safetensors")
    adapter = read_adapter(folder / "file.safetensors")
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
