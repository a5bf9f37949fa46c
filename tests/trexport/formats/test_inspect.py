"""What `trexport inspect` tells of adapters of other libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.trexport.formats.peft_models import CASES, CONVOLUTIONS, LINEAR, Layers, adapted_by_peft, put_kernel, save
from tests.trexport.helpers import run_cli
from trexport.inspecting import inspect

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

TOLD = {
    "LoRA": ("PEFT LORA", "LoRA(3)", [3]),
    "LoRA, patterns": ("PEFT LORA", "LoRA(5)", [2, 3, 5]),
    "DoRA": ("PEFT LORA", "DoRA(3)", [3]),
    "OFT": ("PEFT OFT", "OFT(4)", []),
    "BOFT": ("PEFT BOFT", "BOFT(4)", []),
    "LoHa": ("PEFT LOHA", "LoHa(2)", [2]),
    "LoKr": ("PEFT LOKR", "LoKr(1)", [1]),
    "HRA": ("PEFT HRA", "HRA(4)", [4]),
    "(IA)³": ("PEFT IA3", "(IA)³", []),
}


@pytest.mark.parametrize("name", TOLD)
def test_method_layers_rank_parameters_and_strength(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_kernel(monkeypatch, there=False)
    theirs = adapted_by_peft(Layers(), CASES[name], [*LINEAR, *CONVOLUTIONS])
    folder = save(theirs, tmp_path / "adapter")
    found = inspect(str(folder))
    assert found.kind == "adapter"
    assert (found.facts["format"], found.facts["method"], found.facts["ranks"]) == TOLD[name]
    assert (found.facts["layers"], found.facts["strength"]) == (5, 1.0)
    assert {row[0] for row in found.rows} == {*LINEAR, *CONVOLUTIONS}
    assert found.facts["parameters"] == sum(row[2] for row in found.rows) > 0
    capsys.readouterr()
    assert run_cli(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == TOLD[name][1]


def test_a_single_file_is_an_adapter_too(tmp_path: Path) -> None:
    folder = save(adapted_by_peft(Layers(), CASES["LoRA"], LINEAR), tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "x")
    assert inspect(str(folder / "x")).facts["method"] == "LoRA(3)"


def test_which_base_it_is_for(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(768, 8)})})
    theirs = adapted_by_peft(model, CASES["LoRA"], ["to_k"])
    theirs.peft_config["default"].base_model_name_or_path = "runwayml/stable-diffusion-v1-5"
    facts = inspect(str(save(theirs, tmp_path / "adapter"))).facts
    assert facts["looks_like"] == "Stable Diffusion 1.x"
    assert facts["base_model"]["name_or_path"] == "runwayml/stable-diffusion-v1-5"
