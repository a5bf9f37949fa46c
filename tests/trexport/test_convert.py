"""Adapters in other forms, read back by those who own the forms."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from torch import Tensor

from tests.helpers import trained
from tests.trexport.helpers import leftovers, run_cli
from trexport.convert import TARGETS, convert
from trexport.errors import TrexportError, UsageError
from trexport.formats import read_adapter
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base
from trexport.models.model import load_model, merge_into_
from trlora import Adapter, AdapterSpec, CheckpointError, LayerAdapter, LayerParts, save_adapter

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_out.0"]
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
RESIDUALS: dict[str, dict[str, Any]] = {
    "low_rank": {"type": "low_rank", "rank": 3, "alpha": 5.0},
    "tensor_ring": {"type": "tensor_ring", "rank": 2},
    "hadamard": {"type": "hadamard", "rank": 2, "alpha": 1.0, "kernel": None},
    "kronecker": {"type": "kronecker", "rank": 1, "alpha": None},
}
WHOLE = {"transform": {"type": "tensor_ring", "rank": 2}, "residual": {"type": "tensor_ring", "rank": 2}}

State = dict[str, Tensor]


def written(base: Base, folder: Path, layers: list[str], spec: dict[str, Any], strength: float = 0.8) -> Path:
    """A checkpoint of trlora with random parameters."""
    shapes, parts = base.weight_shapes(), {}
    for seed, path in enumerate(layers):
        rows, columns = shapes[path][0], int(np.prod(shapes[path][1:]))
        built = LayerAdapter.from_spec(AdapterSpec.from_dict(spec), columns, rows, torch.Generator().manual_seed(seed))
        parts[path] = LayerParts.of(trained(built, seed, 0.2).float())
    save_adapter(Adapter.of(parts, strength), folder)
    return folder


def merged(base: Base, argument: Path) -> State:
    model = load_model(base)
    merge_into_(cast(Any, model), open_adapters([str(argument)], base))
    return model.state_dict()


def by_diffusers(base: Base, file: Path) -> State:
    model: Any = copy.deepcopy(load_model(base))  # it writes in place, where the weights are a file's memory
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(file))[:2]
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model)
    model.fuse_lora()
    model.unload_lora()
    return model.state_dict()


def by_peft(base: Base, folder: Path) -> State:
    return (
        PeftModel.from_pretrained(cast(Any, copy.deepcopy(load_model(base))), str(folder))
        .merge_and_unload()
        .state_dict()
    )  # type: ignore[operator]


READERS: dict[str, Callable[[Base, Path], State]] = {"peft": by_peft, "diffusers": by_diffusers, "kohya": by_diffusers}


def name_for(to: str) -> str:
    return "out" if to == "peft" else "out.safetensors"


def assert_same(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_without_a_transform_it_is_exact(residual: str, to: str, base: Base, tmp_path: Path) -> None:
    layers = [*LAYERS, CONVOLUTION]
    source = written(base, tmp_path / "in", layers, {"residual": RESIDUALS[residual]})
    out = tmp_path / name_for(to)
    done = convert(str(source), out, to, base=base)
    assert done.exact
    expected = merged(base, source)
    assert_same(READERS[to](base, out), expected)  # by the owner of the form
    assert_same(merged(base, out), expected)  # and by ours


@pytest.mark.parametrize("output", ["diagonal", "block_orthogonal", "householder", "low_rank"])
def test_a_residual_beside_an_output_transform_is_not_all(output: str, base: Base, tmp_path: Path) -> None:
    parts = {"residual": {"type": "low_rank", "rank": 2}, "output_transform": {"type": output}}
    source = written(base, tmp_path / "in", LAYERS, parts)
    with pytest.raises(UsageError, match="give --base"):
        convert(str(source), tmp_path / "none.safetensors", "kohya")
    done = convert(str(source), tmp_path / "out.safetensors", "kohya", base=base, rank=64)
    assert not done.exact
    assert_same(merged(base, tmp_path / "out.safetensors"), merged(base, source))


def test_a_tensor_ring_has_the_square_of_its_rank(base: Base, tmp_path: Path) -> None:
    source = written(base, tmp_path / "in", LAYERS, {"residual": {"type": "tensor_ring", "rank": 3}})
    done = convert(str(source), tmp_path / "out.safetensors", "kohya")  # linear layers by their names: no base needed
    assert {layer.rank for layer in done.layers} == {9}


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_cut_is_the_best_of_its_rank(rank: int, base: Base, tmp_path: Path) -> None:
    source = written(base, tmp_path / "in", LAYERS, WHOLE)
    done = convert(str(source), tmp_path / "out.safetensors", "diffusers", base=base, rank=rank)
    before, after, found = (
        load_model(base).state_dict(),
        merged(base, source),
        merged(base, tmp_path / "out.safetensors"),
    )
    lost = whole = 0.0
    for layer in done.layers:
        change = (after[f"{layer.path}.weight"] - before[f"{layer.path}.weight"]).double().numpy()
        sizes = np.linalg.svd(change, compute_uv=False)
        least = np.sqrt((sizes[rank:] ** 2).sum())
        assert layer.relative_error == pytest.approx(least / np.linalg.norm(change), rel=1e-3)
        real = (found[f"{layer.path}.weight"] - after[f"{layer.path}.weight"]).double().norm().item()
        assert real == pytest.approx(least, rel=1e-3)
        lost, whole = lost + least**2, whole + float((change**2).sum())
    assert done.relative_error == pytest.approx(np.sqrt(lost / whole), rel=1e-3)


def test_a_greater_error_is_refused_before_anything_is_written(base: Base, tmp_path: Path) -> None:
    source = written(base, tmp_path / "in", LAYERS, WHOLE)
    with pytest.raises(TrexportError, match="at most 0.01 is allowed"):
        convert(str(source), tmp_path / "out.safetensors", "kohya", base=base, rank=1, max_error=0.01)
    convert(str(source), tmp_path / "out.safetensors", "kohya", base=base, rank=1, max_error=2, dry_run=True)
    assert leftovers(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("fields", "options", "says"),
    [
        (WHOLE, {}, "give --base"),
        (WHOLE, {"base": True}, "give --rank"),
        ({"residual": RESIDUALS["low_rank"]}, {"out": "folder"}, "ends in .safetensors"),
        ({"residual": RESIDUALS["low_rank"]}, {"layers": [CONVOLUTION]}, "a linear layer or a convolution"),
        ({"residual": RESIDUALS["low_rank"]}, {"to": "trlora", "rank": 2}, "--rank"),
        ({"residual": RESIDUALS["low_rank"]}, {"to": "other"}, "expected one of"),
    ],
)
def test_what_is_missing_is_said(
    fields: dict[str, Any], options: dict[str, Any], says: str, base: Base, tmp_path: Path
) -> None:
    source = written(base, tmp_path / "in", options.get("layers", LAYERS), fields)
    with pytest.raises(UsageError, match=says):
        convert(
            str(source),
            tmp_path / options.get("out", "out.safetensors"),
            options.get("to", "kohya"),
            base=base if "base" in options else None,
            rank=options.get("rank"),
        )
    assert leftovers(tmp_path) == ["in"]


def test_an_adapter_of_another_base_is_refused(base: Base, tmp_path: Path) -> None:
    source = written(base, tmp_path / "in", LAYERS, WHOLE)
    with pytest.raises(CheckpointError, match="does not fit"):
        convert(str(source), tmp_path / "out.safetensors", "kohya", base=open_base("random:sd15"), rank=1)


def test_where_it_comes_from_is_kept(base: Base, tmp_path: Path) -> None:
    about = {"ss_base_model_version": "sd_v1", "modelspec.title": "ink"}
    name = "lora_unet_" + LAYERS[0].replace(".", "_")
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 16), f"{name}.lora_up.weight": torch.randn(16, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={**about, "other": "x"})
    for number, to in enumerate(TARGETS):
        out = tmp_path / f"{number}{'' if to == 'peft' else '.safetensors'}"
        convert(str(tmp_path / "a.safetensors"), out, to)
        file = out / "adapter_model.safetensors" if out.is_dir() else out
        with safetensors.safe_open(file, "pt") as opened:
            found = opened.metadata()
        assert {key: found[key] for key in about} == about
        assert read_adapter(out).layers.keys() == {LAYERS[0]}


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_and_back_it_is_the_same(to: str, base: Base, tmp_path: Path) -> None:
    source = written(base, tmp_path / "in", LAYERS, {"residual": RESIDUALS["low_rank"]})
    convert(str(source), tmp_path / name_for(to), to)
    convert(str(tmp_path / name_for(to)), tmp_path / "back", "trlora")
    adapter = read_adapter(tmp_path / "back")
    assert (adapter.format, adapter.config.strength) == ("trlora", 1.0)
    assert_same(merged(base, tmp_path / "back"), merged(base, source))


def test_command_line(base: Base, unet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(base, tmp_path / "in", LAYERS, WHOLE)
    command = [
        "convert",
        source,
        "--to",
        "kohya",
        "--base",
        unet_folder,
        "--rank",
        "2",
        "-o",
        tmp_path / "a.safetensors",
    ]
    assert run_cli(command) == 0
    assert "relative error" in capsys.readouterr().out
    assert run_cli(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run_cli([*command, "--overwrite", "--json", "--dtype", "fp16"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"][LAYERS[0]] == 2
    assert run_cli(["convert", tmp_path / "a.safetensors", "-o", tmp_path / "own", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]
    assert run_cli(["inspect", tmp_path / "own"]) == 0
