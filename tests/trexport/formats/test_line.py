"""Adapters of PEFT through the rest of the line: merged on disk, factored, swappable."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor

from tests.helpers import bits
from tests.trexport.formats.peft_models import CASES, Case, adapted_by_peft, put_kernel, save
from tests.trexport.helpers import SIZES, drawn_by_torch, run_cli, run_onnx
from trexport.adapter_file import factored_of
from trexport.artifact import open_artifact
from trexport.errors import UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.graph.swappable import SwappableOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import WEIGHTS_STEM, Base
from trexport.models.model import load_model, random_feeds
from trexport.parity.metrics import relative_l2
from trexport.refit import refit_weights
from trexport.session import Session

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:RuntimeWarning")

LINEAR = r".*(attn\d\.to_[qkv]|to_out\.0|ff\.net\.2)"
ALL = r".*(attn\d\.to_[qkv]|to_out\.0|proj_in|resnets\.\d\.conv[12]|samplers\.0\.conv)"
CHOSEN = {
    "lora": ("LoRA", ALL),
    "dora": ("DoRA", LINEAR),
    "boft": ("BOFT", LINEAR),
    "lokr": ("LoKr, another factor", LINEAR),
    "loha": ("LoHa, Tucker", ALL),
    "ia3": ("(IA)³", LINEAR),
}


@pytest.fixture(scope="module")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that PEFT has written, for a UNet."""
    root = tmp_path_factory.mktemp("peft")
    folders = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_kernel(monkeypatch, there=False)
        for name, (case, targets) in CHOSEN.items():
            given = CASES[case]
            fields = {"feedforward_modules": ["ff.net.2"]} if name == "ia3" else given.fields
            wrapped = adapted_by_peft(load_model(base), Case(given.config, fields, amount=0.05), targets)
            folders[name] = save(wrapped, root / name)
    return folders


def feeds_of(base: Base, artifact: Path) -> dict[str, Tensor]:
    return random_feeds(open_artifact(artifact).manifest.io, SIZES, seed=4)


def test_merged_on_disk_it_is_what_peft_merges(
    base: Base, unet_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """(IA)³ and a LoRA on convolutions at once; biases are scaled too."""
    given = [f"{adapters['ia3']}=0.5", str(adapters["lora"])]
    assert run_cli(["merge", unet_folder, *given, "-o", tmp_path / "out"]) == 0
    found = safetensors.torch.load_file(tmp_path / "out" / f"{WEIGHTS_STEM}.safetensors")
    plain = load_model(base).state_dict()
    theirs = []
    for name in ("ia3", "lora"):
        unet = copy.deepcopy(load_model(base))  # PEFT merges in place, and the weights may be a file's memory
        merged = PeftModel.from_pretrained(unet, str(adapters[name])).merge_and_unload()  # type: ignore[arg-type, operator]
        theirs.append(merged.state_dict())
    changed = set()
    for key, tensor in plain.items():
        expected = tensor + 0.5 * (theirs[0][key] - tensor) + (theirs[1][key] - tensor)
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)
        if bits(found[key]) != bits(tensor):
            changed.add(key.rpartition(".")[2])
    assert changed == {"weight", "bias"}


def test_factored_with_an_adapter_of_each_kind(base: Base, adapters: dict[str, Path], tmp_path: Path) -> None:
    chosen = (("dora", 0.8), ("lokr", -0.5), ("ia3", 0.7), ("lora", 0.6), ("loha", 0.4))  # the last two on convolutions
    given = [f"{adapters[name]}={strength}" for name, strength in chosen]
    options = ExportOptions(factored=FactoredOptions(), fixed=SIZES)
    export_onnx(base, open_adapters(given, base), tmp_path / "out", options)
    artifact = open_artifact(tmp_path / "out")
    plan = factored_of(artifact).plan
    assert {layer.path for path, layer in plan.items() if "attn" in path} == {"weight"}
    assert plan["down_blocks.0.resnets.0.conv1"].tokens == 2 * 8 * 8
    assert plan["down_blocks.0.downsamplers.0.conv"].tokens == 2 * 4 * 4
    feeds = feeds_of(base, tmp_path / "out")
    found = run_onnx(artifact.onnx_path, feeds)["out_sample"]
    expected = drawn_by_torch(base, given, feeds)
    assert relative_l2(found, expected) < 1e-5
    assert relative_l2(found, drawn_by_torch(base, [], feeds)) > 1e-2
    off = {f"adapter_{k}.strength": torch.zeros(1) for k in range(len(chosen))}
    plain = drawn_by_torch(base, [], feeds)
    np.testing.assert_allclose(run_onnx(artifact.onnx_path, feeds | off)["out_sample"], plain, rtol=0, atol=2e-6)


def test_a_swappable_model_takes_them_all_in_turn(base: Base, adapters: dict[str, Path], tmp_path: Path) -> None:
    names = ("lora", "dora", "loha")
    options = ExportOptions(swappable=SwappableOptions(blank=True), fixed=SIZES)
    export_onnx(base, open_adapters([str(adapters[name]) for name in names], base), tmp_path / "out", options)
    feeds = feeds_of(base, tmp_path / "out")
    with Session(tmp_path / "out") as session:
        plain = session.run(feeds)["out_sample"].clone()
        for name in names:
            session.load_adapter(name, adapters[name])
            session.activate({name: 0.7})
            found = session.run(feeds)["out_sample"]
            assert relative_l2(found, drawn_by_torch(base, [f"{adapters[name]}=0.7"], feeds)) < 1e-5
            assert relative_l2(found, plain) > 1e-3
        session.activate({"lora": 0.7, "dora": -0.3})
        expected = drawn_by_torch(base, [f"{adapters['lora']}=0.7", f"{adapters['dora']}=-0.3"], feeds)
        assert relative_l2(session.run(feeds)["out_sample"], expected) < 1e-5
        session.deactivate()
        assert bits(session.run(feeds)["out_sample"]) == bits(plain)


def test_what_a_form_cannot_carry_is_said_before_anything_is_written(
    base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for name, options, words in (
        ("lora", ExportOptions(factored=FactoredOptions(bank=2)), "convolutions .* without --bank, or --swappable"),
        ("ia3", ExportOptions(swappable=SwappableOptions()), "bias.* merged, or --factored"),
        ("dora", ExportOptions(factored=FactoredOptions(path="dense")), "--path weight"),
    ):
        with pytest.raises(UsageError, match=words):
            export_onnx(base, open_adapters([str(adapters[name])], base), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="refit sets weights only"):
        refit_weights(base, [], open_adapters([str(adapters["ia3"])], base), "fp32")
