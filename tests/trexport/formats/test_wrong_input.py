"""Damaged and foreign adapters of PEFT: one clear message, exit code 1, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.trexport.helpers import leftovers, run_cli
from trexport.formats import FORMATS, looks_like, read_adapter
from trlora import CheckpointError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, CONV = f"{BLOCK}.attn1.to_q", "down_blocks.0.resnets.0.conv1"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

Tensors = dict[str, Tensor]
Config = dict[str, Any]


def lora(path: str, out: int, inputs: int, *kernel: int) -> Tensors:
    """A layer's pair, of rank 2."""
    a, b = torch.randn(2, inputs, *kernel), torch.randn(out, 2, *(1 for _ in kernel))
    return {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}


def whole() -> Tensors:
    return {**lora(QUERY, 16, 16), **lora(f"{BLOCK}.attn2.to_k", 16, 24), **lora(CONV, 16, 16, 3, 3)}


def write(folder: Path, tensors: Tensors, config: Config | None) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def key(path: str, leaf: str = "lora_A.weight") -> str:
    return f"base_model.model.{path}.{leaf}"


def without(name: str) -> Callable[[Tensors, Config], Any]:
    return lambda tensors, config: tensors.pop(name)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Config], Any]:
    return lambda tensors, config: tensors.update({name: change(tensors[name])})


def nan(tensor: Tensor) -> Tensor:
    tensor[0, 0] = torch.nan
    return tensor


def moved(tensors: Tensors, config: Config) -> None:
    """A convolution's pair under the name of a linear layer."""
    for leaf in ("lora_A.weight", "lora_B.weight"):
        tensors[key(QUERY, leaf)] = tensors.pop(key(CONV, leaf))


def linear_on_conv(tensors: Tensors, config: Config) -> None:
    tensors.update(lora(CONV, 16, 144))


def many(tensors: Tensors, config: Config) -> None:
    tensors.update({f"lora_unet_{n:05}.alpha": torch.zeros(()) for n in range(10_000)})


def ten_and_more(tensors: Tensors, config: Config) -> None:
    for n in range(25):
        tensors.update(lora(f"nowhere.{n:02}", 3, 4))


CASES: dict[str, tuple[Callable[[Tensors, Config], Any], list[str]]] = {
    "half of a pair": (without(key(QUERY, "lora_B.weight")), [QUERY, "lora_B.weight is missing", "lora_A.weight"]),
    "no alpha": (lambda t, c: c.pop("lora_alpha"), ["lora_alpha is missing"]),
    "alpha zero": (lambda t, c: c.update(lora_alpha=0), ["alpha is 0", "above 0"]),
    "alpha no number": (lambda t, c: c.update(alpha_pattern={"to_q": "much"}), ["lora_alpha is 'much'"]),
    "a rank that contradicts": (lambda t, c: c.update(rank_pattern={"to_q": 3}), [QUERY, "rank", "3", "2"]),
    "no expression": (lambda t, c: c.update(rank_pattern={"(": 3}), ["rank_pattern", "'('"]),
    "convolution on a linear layer": (moved, [QUERY, "a convolution of 3×3", "a linear layer"]),
    "linear on a convolution": (linear_on_conv, [CONV, "for a linear layer", "a convolution of 3×3"]),
    "another layer": (lambda t, c: t.update(lora(f"{BLOCK}.attn1.to_kk", 16, 16)), ["to_kk", "nearest", "attn1.to_k"]),
    "another width": (lambda t, c: t.update(lora(QUERY, 16, 20)), [QUERY, "20 → 16", "16 → 16"]),
    "10,000 unknown keys": (many, ["10000 of 10006", "lora_unet_00000", "lora_unet_00009", "and 9990 more"]),
    "25 unknown layers": (ten_and_more, ["24 more of 28 layers", "nowhere.09", "and 15 more"]),
    "fp8": (changed(key(QUERY), lambda t: t.to(torch.float8_e4m3fn)), [QUERY, "float8_e4m3fn", "16 bits"]),
    "integers": (changed(key(QUERY), lambda t: t.to(torch.int32)), [QUERY, "int32"]),
    "NaN": (changed(key(QUERY), nan), [QUERY, "1 of 32 values"]),
    "a bias of B": (lambda t, c: c.update(lora_bias=True), ["lora_bias is true"]),
    "trained biases": (lambda t, c: c.update(bias="all"), ["bias is 'all'"]),
    "a start that moves the base": (lambda t, c: c.update(init_lora_weights="pissa_niter_16"), ["pissa", "convert"]),
    "a variant": (lambda t, c: c.update(use_qalora=True), ["use_qalora"]),
    "DoRA without its norms": (lambda t, c: c.update(use_dora=True), ["use_dora is True", "missing"]),
    "another method": (lambda t, c: c.update(peft_type="LOHAX"), ["'LOHAX'", "nearest", "LOHA"]),
    "another method's keys": (lambda t, c: c.update(peft_type="HRA"), ["6 of 6 keys", "hra_u"]),
    "a flag that is none": (lambda t, c: c.update(use_rslora="yes"), ["use_rslora is 'yes'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_message(
    case: str, unet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = CASES[case]
    tensors, config = whole(), dict(CONFIG)
    damage(tensors, config)
    adapter = write(tmp_path / "adapter", tensors, config)
    assert run_cli(["merge", unet_folder, adapter, "-o", tmp_path / "out"]) == 1
    error = capsys.readouterr().err
    assert error.count("Error: ") == 1
    assert "Traceback" not in error
    assert len(error) < 3000
    # where the message is folded to the width of the terminal is not of interest
    told = "".join(error.split())
    assert all("".join(word.split()) in told for word in [str(adapter), *words]), error
    assert leftovers(tmp_path) == ["adapter"]


def test_undamaged_it_is_taken(unet_folder: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", whole(), CONFIG)
    assert run_cli(["merge", unet_folder, adapter, "-o", tmp_path / "out"]) == 0


def test_halves_are_counted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in whole().items() if "lora_B" not in name}
    with pytest.raises(CheckpointError, match=r"lora_B\.weight is missing.*\(and 2 more of 3 layers\)"):
        read_adapter(write(tmp_path / "adapter", tensors, CONFIG))


def test_bfloat16_is_read_as_it_is(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in whole().items()}
    adapter = read_adapter(write(tmp_path / "adapter", tensors, CONFIG))
    assert {tensor.dtype for tensor in adapter.tensors().values()} == {torch.bfloat16}
    residual = adapter.layers[QUERY].residual
    assert residual is not None
    a, b = (tensors[key(QUERY, f"lora_{factor}.weight")].float() for factor in "AB")
    torch.testing.assert_close(residual.float().delta(), 2 * b @ a)


def test_a_single_file_needs_its_config_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", whole(), CONFIG)
    file = folder / "renamed.bin"
    (folder / "adapter_model.safetensors").rename(file)
    assert len(read_adapter(file).layers) == 3
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json .* alpha"):
        read_adapter(file)


def test_keys_of_no_format_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "x"
    safetensors.torch.save_file({f"k{n:02}": torch.zeros(1) for n in range(12)}, file, metadata={"ss_v2": "1"})
    with pytest.raises(CheckpointError, match=r"ss_v2; 12 keys: k00, .*k09 and 2 more; formats: trlora") as told:
        read_adapter(file)
    assert all(adapter_format.name in str(told.value) for adapter_format in FORMATS)


def test_pickles_are_named_and_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    torch.save(whole(), folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("widths", "name"),
    [
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 768}, "Stable Diffusion 1.x"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": 1024}, "Stable Diffusion 2.x"),
        ({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 2048}, "Stable Diffusion XL"),
        ({"down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": None}, "Stable Diffusion XL"),
        ({"single_transformer_blocks.3.attn.to_q": 3072}, "Flux"),
        ({"transformer_blocks.3.attn.add_k_proj": 1536}, "Stable Diffusion 3"),
        ({"text_model.encoder.layers.0.self_attn.q_proj": 768}, "a text encoder"),
        ({"transformer_blocks.3.attn.to_k": 1536}, "Stable Diffusion 3 or Flux"),
        ({QUERY: 16}, "a UNet"),
        ({"encoder.block.0.layer.0.SelfAttention.q": 16}, None),
    ],
)
def test_what_layers_look_like(widths: dict[str, int | None], name: str | None) -> None:
    assert looks_like(widths) == name


def test_keys_of_another_base_say_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its layers are those of SDXL; the base is Stable Diffusion 1.5's true architecture."""
    tensors = lora("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", 640, 2048)
    adapter = write(tmp_path / "adapter", tensors, CONFIG)
    assert run_cli(["merge", "random:sd15", adapter, "-o", tmp_path / "out", "--dry-run"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "looks like one for Stable Diffusion XL, random:sd15 like Stable Diffusion 1.x" in error
