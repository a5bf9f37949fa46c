"""What a merged pipeline has beside what adapters are on: all that its index lists, in the variant that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.helpers import bits
from tests.trexport.helpers import copy_of, leftovers, run_cli
from tests.trexport.pipelines import edit_json, fake_hub

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on a layer of the first text encoder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{TEXT}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in SHAPES.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


SHAPES = {"A": (2, 32), "B": (32, 2)}


@pytest.fixture
def with_t5(pipelines: Path, tmp_path: Path) -> Path:
    """The tiny Stable Diffusion 3 with a T5, which no export knows: in float32, and beside it in float16, in shards. Of the
    transformer there are both too, of all else float32 only."""
    folder = copy_of(pipelines / "sd3", tmp_path / "sd3")
    config = T5Config(vocab_size=500, d_model=32, d_ff=64, num_layers=3, num_heads=4, d_kv=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        t5: Any = T5EncoderModel(config)
    t5.save_pretrained(folder / "text_encoder_3")
    with torch.no_grad():
        t5.half().shared.weight.mul_(2)  # to be told apart
    t5.save_pretrained(folder / "text_encoder_3", variant="fp16", max_shard_size="40KB")
    edit_json(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer_3" / "spiece.model").write_bytes(b"pieces")
    edit_json(folder / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])
    plain = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in safetensors.torch.load_file(plain).items()}
    safetensors.torch.save_file(halves, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    return folder


def t5_of(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    model: Any = T5EncoderModel.from_pretrained(folder / "text_encoder_3", variant=variant)
    return model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(bits(first[name]) == bits(second[name]) for name in first)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_component_of_any_class_is_taken_over_in_the_variant(
    variant: str | None, with_t5: Path, adapter: Path, tmp_path: Path
) -> None:
    arguments = [] if variant is None else ["--variant", variant]
    assert run_cli(["merge", with_t5, adapter, "-o", tmp_path / "out", *arguments]) == 0
    assert same(t5_of(tmp_path / "out"), t5_of(with_t5, variant))
    assert not same(t5_of(with_t5), t5_of(with_t5, "fp16"))
    names = leftovers(tmp_path / "out" / "text_encoder_3")
    assert names == (
        ["config.json", "model.safetensors"] if variant is None else sorted({*names, INDEX, "config.json"})
    )
    assert not [name for name in names if "fp16" in name]
    assert (tmp_path / "out" / "tokenizer_3" / "spiece.model").read_bytes() == b"pieces"


def test_a_text_encoder_in_shards_of_a_variant(with_t5: Path, adapter: Path, tmp_path: Path) -> None:
    """One index is written, of the shards as they are called now."""
    encoder = with_t5 / "text_encoder"
    model: Any = CLIPTextModelWithProjection.from_pretrained(encoder)
    (encoder / "model.safetensors").unlink()
    model.half().save_pretrained(encoder, variant="fp16", max_shard_size="40KB")
    assert run_cli(["merge", with_t5, adapter, "-o", tmp_path / "out", "--variant", "fp16"]) == 0
    names = leftovers(tmp_path / "out" / "text_encoder")
    assert [name for name in names if name.endswith(".json")] == ["config.json", INDEX]
    places = json.loads((tmp_path / "out" / "text_encoder" / INDEX).read_text())["weight_map"]
    assert {*places.values(), "config.json", INDEX} == set(names)
    merged: Any = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder")
    changed = [n for n, tensor in merged.state_dict().items() if bits(tensor) != bits(model.state_dict()[n])]
    assert [name.removesuffix(".weight") for name in changed] == [TEXT.removeprefix("text_encoder.")]


@pytest.mark.parametrize("damage", ["pickles", "config", "nothing"])
def test_a_model_without_weights_is_no_component(
    damage: str, with_t5: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (with_t5 / "text_encoder_3").iterdir():
        if file.name != "config.json" or damage == "nothing":
            file.unlink()
    if damage == "pickles":
        torch.save({}, with_t5 / "text_encoder_3" / "pytorch_model.bin")
    assert run_cli(["merge", with_t5, adapter, "-o", tmp_path / "out"]) == 0
    assert "T5EncoderModel, left out" in capsys.readouterr().out
    assert not (tmp_path / "out" / "text_encoder_3").exists()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["text_encoder_3"], index["tokenizer_3"]) == ([None, None], ["transformers", "T5TokenizerFast"])


@pytest.mark.parametrize(("damage", "says"), [("shard", "names the shard"), ("variant", "--variant")])
def test_half_a_component_is_refused(
    damage: str, says: str, with_t5: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t5 = with_t5 / "text_encoder_3"
    if damage == "shard":
        next(t5.glob("model.fp16-*")).unlink()
    else:
        (t5 / "model.safetensors").unlink()
    arguments = ["--variant", "fp16"] if damage == "shard" else []
    assert run_cli(["merge", with_t5, adapter, "-o", tmp_path / "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert "text_encoder_3" in error
    assert says in error
    assert leftovers(tmp_path) == ["a.safetensors", "sd3"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_a_hub_id_all_that_the_index_lists_is_fetched(
    variant: str | None, with_t5: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({}, with_t5 / "text_encoder_3" / "pytorch_model.bin")
    arguments = [] if variant is None else ["--variant", variant]
    assert run_cli(["merge", with_t5, adapter, "-o", tmp_path / "local", *arguments]) == 0
    asked = fake_hub(with_t5, tmp_path / "cache", monkeypatch)
    command = ["merge", "owner/name", adapter, "-o", tmp_path / "out", "--revision", "main", *arguments]
    assert run_cli(command) == 0
    assert asked[0] == "main"
    assert set(asked[1:]) == {"0123abcd"}
    assert same(t5_of(tmp_path / "out"), t5_of(with_t5, variant))
    local, out = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        for folder in (tmp_path / "local", tmp_path / "out")
    )
    assert out == local
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_dry_run_counts_text_encoders_in_the_dtype_of_the_result(
    pipelines: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for dtype in ("fp32", "fp16"):
        command = ["merge", pipelines / "sd", adapter, "-o", tmp_path / "out", "--dtype", dtype, "--dry-run", "--json"]
        assert run_cli(command) == 0
        told.append(json.loads(capsys.readouterr().out))
    weights = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    numbers = sum(t.numel() for file in weights for t in safetensors.torch.load_file(pipelines / "sd" / file).values())
    assert told[0]["size_bytes"] - told[1]["size_bytes"] == 2 * numbers
    assert told[0]["adapted"] == {"unet": 0, "text_encoder": 1}
    assert (
        run_cli(["merge", pipelines / "sd" / "unet", "random:lora:2", "-o", tmp_path / "out", "--dry-run", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["adapted"] == {"unet": 32}  # of one model it is an object too
