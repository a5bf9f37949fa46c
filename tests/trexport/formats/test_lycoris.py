"""Files of LyCORIS, every method of it, against its own modules."""

from __future__ import annotations

import copy
import json
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
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from tests.helpers import bits
from tests.trexport.helpers import SIZES, run_cli
from trexport.adapter_file import open_for
from trexport.artifact import Artifact
from trexport.convert import convert
from trexport.errors import UsageError
from trexport.formats import method_of, read_adapter
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trexport.models.model import first_output, load_model, merge_into_, random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.reference import Reference
from trexport.refit import refit_weights
from trlora import CheckpointError, adapted_weight, load_adapter

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


def trained(kind: Any, fields: dict[str, Any], layer: nn.Module, amount: float = 0.3) -> Any:
    """A module of LyCORIS with random parameters."""
    module = kind(NAME, layer, **fields)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "org_module" not in name and name != "dora_scale":
                parameter.copy_(amount * torch.randn(parameter.shape) + (1 if name == "rescale" else 0))
        if hasattr(module, "dora_scale"):
            module.dora_scale.mul_(1 + 0.2 * torch.rand(module.dora_scale.shape))
    return module


def state_of(module: Any) -> dict[str, Tensor]:
    """As LyCORIS saves it."""
    if (
        isinstance(module, FullModule) and module.bias is not None
    ):  # until it is applied its weight is the difference, which it saves afterwards
        return {f"{NAME}.diff": module.weight.detach().clone(), f"{NAME}.diff_b": module.bias.detach().clone()}
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


@pytest.mark.parametrize("made", [nn.Linear(20, 12), nn.Conv2d(20, 12, 3)], ids=["linear", "conv 3x3"])
def test_dylora_is_a_lora_of_all_its_ranks(made: nn.Module, tmp_path: Path) -> None:
    """Its own forward draws ranks by lot, `block_size` times as strong; its file has the keys of a LoRA, nothing else tells
    it from one, and LyCORIS itself reads it as one."""
    module = trained(DyLoraModule, {"lora_dim": 4, "block_size": 2, "alpha": 3}, made)
    safetensors.torch.save_file(state_of(module), tmp_path / "file.safetensors")
    adapter = read_adapter(tmp_path / "file.safetensors")
    assert method_of(adapter) == "LoRA(4)"
    up, down = torch.cat(list(module.up_list), 1), torch.cat(list(module.down_list)).flatten(1)
    residual = adapter.layers[PATH].residual
    assert residual is not None
    torch.testing.assert_close(residual.delta(), up @ down * 3 / 4)


def test_kohyas_own_oft_has_the_keys_of_lycoris_under_another_prefix(tmp_path: Path) -> None:
    module = trained(DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}, nn.Linear(20, 12))
    found = []
    for prefix in ("lora_unet_", "oft_unet_"):
        file = tmp_path / f"{prefix}.safetensors"
        safetensors.torch.save_file({k.replace("lora_unet_", prefix): v for k, v in state_of(module).items()}, file)
        found.append(read_adapter(file).tensors())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


UNET_LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "down_blocks.0.resnets.0.norm1": (NormModule, {}),
    "down_blocks.0.attentions.0.transformer_blocks.0.norm2": (NormModule, {}),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (ButterflyOFTModule, {"lora_dim": 4}),
    "up_blocks.0.resnets.0.conv1": (GLoRAModule, {"lora_dim": 3, "alpha": 2}),
    "up_blocks.0.resnets.1.conv2": (FullModule, {}),
    "conv_norm_out": (NormModule, {}),
}
"""Normalisations, biases, transforms of outputs and of inputs in one file."""


@pytest.fixture
def unet_file(base: Base, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A file of LyCORIS' for a UNet, and the UNet that draws with it."""
    unet = copy.deepcopy(load_model(base))
    tensors: dict[str, Tensor] = {}
    for path, (kind, fields) in UNET_LAYERS.items():
        module = trained(kind, fields, unet.get_submodule(path), 0.03).eval()
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {key.replace(NAME, name): tensor for key, tensor in state_of(module).items()}
        module.apply_to()
    safetensors.torch.save_file(tensors, tmp_path / "lycoris.safetensors")
    return tmp_path / "lycoris.safetensors", unet


def test_a_file_of_all_kinds_through_the_line(
    base: Base, unet_folder: Path, unet_file: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, theirs = unet_file
    assert run_cli(["merge", unet_folder, file, "-o", tmp_path / "merged", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 4
    assert len(told["offsets"]) == 7
    feeds = random_feeds(base.architecture.spec("fp32"), SIZES)
    with torch.inference_mode():
        expected, plain = first_output(theirs, feeds), first_output(load_model(base), feeds)
        assert relative_l2(plain, expected) > 1e-2
        merged = load_model(open_base(str(tmp_path / "merged")))
        assert relative_l2(first_output(merged, feeds), expected) < 1e-5
    reference = Reference(base, open_adapters([str(file)], base), "cpu")
    assert relative_l2(reference.adapted(feeds)[0], expected) < 1e-5
    assert bits(reference.plain(feeds)[0]) == bits(plain)
    assert relative_l2(reference.adapted(feeds)[0], expected) < 1e-5
    # as our own checkpoint, and in what an export starts from
    assert run_cli(["convert", file, "-o", tmp_path / "ours"]) == 0
    again, first = load_adapter(tmp_path / "ours"), read_adapter(file)
    assert {k: bits(t) for k, t in again.tensors().items()} == {k: bits(t) for k, t in first.tensors().items()}
    in_memory = load_model(base)
    merge_into_(in_memory, open_adapters([str(tmp_path / "ours")], base))
    with torch.inference_mode():
        assert relative_l2(first_output(in_memory, feeds), expected) < 1e-5


def test_half_a_strength_is_half_of_every_offset(
    base: Base, unet_folder: Path, unet_file: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    file, _ = unet_file
    for strength in (0.5, 0.0):
        out = tmp_path / f"merged{strength}"
        assert run_cli(["merge", unet_folder, f"{file}={strength}", "-o", out]) == 0
        found, offsets = safetensors.torch.load_file(next(out.glob("*.safetensors"))), read_adapter(file).offsets
        for name, tensor in load_model(base).state_dict().items():
            if name in offsets:
                torch.testing.assert_close(found[name], tensor + strength * offsets[name], rtol=0, atol=1e-6)
            if strength == 0:
                assert bits(found[name]) == bits(tensor)


def test_only_a_merged_model_carries_offsets(
    base: Base,
    unet_file: tuple[Path, nn.Module],
    two_slots: Artifact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, _ = unet_file
    bound = open_adapters([str(file)], base)
    for options, words in (
        (ExportOptions(factored=FactoredOptions()), "7 biases and weights of normalisations .* merged"),
        (ExportOptions(swappable=SwappableOptions()), "takes other weights only: export it merged$"),
    ):
        with pytest.raises(UsageError, match=words):
            export_onnx(base, bound, tmp_path / "out", options)
    with pytest.raises(UsageError, match="refit sets weights only"):
        refit_weights(base, [], bound, "fp32")
    with pytest.raises(CheckpointError, match="changes 7 biases and weights of normalisations .* merge it"):
        open_for(two_slots, [str(file)])
    with pytest.raises(UsageError, match="which no LoRA holds"):
        convert(str(file), tmp_path / "out.safetensors", "kohya", base=base, rank=2)
    capsys.readouterr()
    assert run_cli(["inspect", file, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["offsets"] == 7
    assert told["carried"]["factored"].startswith("no: 7")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("lora_unet_mid_block_norm9.w_norm", (32,), "mid_block.norm9.weight: the base has no such parameter"),
        ("lora_unet_conv_norm_out.w_norm", (31,), r"the offset has shape \(31,\), the base's parameter"),
        ("lora_unet_conv_norm_out.b_norm", (32, 1), "expected one dimension"),
    ],
)
def test_an_offset_that_fits_nothing_is_refused(
    name: str, shape: tuple[int, ...], says: str, base: Base, tmp_path: Path
) -> None:
    safetensors.torch.save_file({name: torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=says):
        open_adapters([str(tmp_path / "a.safetensors")], base)


def check(kind: Any, module: Any, made: nn.Module, folder: Path) -> None:
    """A layer of LyCORIS and what is read from its file draw the same: by its forward, which adapters are trained with; its
    `get_merged_weight` (4.1.3) scales LoHa and LoKr by alpha / r twice."""
    module.eval()
    safetensors.torch.save_file(state_of(module), folder / "file.safetensors")
    adapter = read_adapter(folder / "file.safetensors")
    assert adapter.format == ("kohya" if kind is LoConModule else "LyCORIS")
    assert isinstance(made.weight, Tensor)
    weight = made.weight.detach().clone()
    parameters = {f"{PATH}.{name}": tuple(parameter.shape) for name, parameter in made.named_parameters()}
    bound = adapter.bind({PATH: tuple(weight.shape)}, parameters)[PATH]
    x = torch.randn(5, 20) if weight.ndim == 2 else torch.randn(2, 20, 5, 4)
    merged = copy.deepcopy(made)
    with torch.no_grad():
        plain = made(x)
        merged.weight.copy_(adapted_weight(weight, [(bound, 1.0)], torch.float64))  # type: ignore[operator]
        for name, offset in adapter.offsets.items():
            merged.get_parameter(name.rpartition(".")[2]).add_(offset)
        module.apply_to()
        expected = made(x)
        found = merged(x)
    assert (expected - plain).norm() > 0.02 * plain.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
