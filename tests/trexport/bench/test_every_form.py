"""`trexport bench --forms`, on a CPU with stand-ins for what takes minutes: the engines' compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from tests.trexport.helpers import leftovers, run_cli
from trexport.bench import every_form
from trexport.bench.every_form import COMPILED, ENGINE, ONNX, TORCH, bench_every_form
from trexport.bench.run import BenchOptions
from trexport.errors import UsageError
from trexport.models.adapters import open_adapters
from trexport.models.architectures import RANDOM
from trexport.models.base import Base


@pytest.fixture
def shallow_folder(tmp_path: Path) -> Path:
    """A UNet of one level: it is compiled twice, and the table is the same for any."""
    blocks = {"block_out_channels": [16], "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
    model = UNet2DConditionModel.from_config(RANDOM["tiny"] | blocks)
    assert isinstance(model, UNet2DConditionModel)
    model.save_pretrained(tmp_path / "shallow")
    return tmp_path / "shallow"


@pytest.mark.slow
def test_the_table(
    shallow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged engine stands in for the compiled baseline too: it is the same compiler."""
    asked: list[Any] = []

    def without_compile(options: BenchOptions, **changes: Any) -> BenchOptions:
        asked.append(changes)
        backends = tuple(name for name in changes.get("backends", ()) if name != COMPILED)
        return replaced(options, **{**changes, "backends": backends})

    replaced = every_form.replace
    monkeypatch.setattr(
        every_form,
        "replace",
        lambda what, **changes: (without_compile if isinstance(what, BenchOptions) else replaced)(what, **changes),
    )
    sizes = ["--batch-size", "1", "--height", "8", "--width", "8", "--sequence-length", "4"]
    command = ["bench", shallow_folder, "random:tlora:1:2", "--forms", "--device", "cpu", "--iterations", "2", "--json"]
    assert run_cli([*command, *sizes, "-o", tmp_path / "out"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert leftovers(tmp_path / "out") == ["bench.json", "bench.png"]
    assert COMPILED in asked[0]["backends"]
    steps = {result["backend"]: result for result in found["steps"]["results"]}
    assert steps.keys() == {
        TORCH,
        *(f"{ENGINE}, {form}" for form in ("merged", "swappable")),
        *(f"{ONNX}, {form}" for form in ("merged", "factored")),
    }
    assert max(result["relative_l2"] for result in steps.values()) <= 1e-5
    rows = {row["what"]: row for row in found["rows"]}
    ratio = rows[f"{ENGINE}, swappable ÷ {ENGINE}, merged"]["value"]
    medians = [steps[f"{ENGINE}, {form}"]["latency"]["median_ms"] for form in ("swappable", "merged")]
    assert ratio == pytest.approx(medians[0] / medians[1])
    assert rows[f"{ONNX}, a batch of 8 with 8 adapters ÷ merged"]["value"] > 0
    assert rows["swap of all adapted weights"]["unit"] == "ms"
    assert {cost["form"] for cost in found["forms"]["costs"]} == steps.keys() - {TORCH}
    swapped = next(cost for cost in found["forms"]["costs"] if cost["form"] == f"{ENGINE}, swappable")
    both = rows[f"({ENGINE}, swappable + a swap) ÷ {ENGINE}, merged"]["value"]
    assert both == pytest.approx((medians[0] + swapped["swap_ms"]) / medians[1])
    assert "by torch (no kernel for cpu)" in swapped["swapped_by"]


def test_it_needs_an_adapter(base: Base, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter given"):
        bench_every_form(base, open_adapters([], base), "cpu", tmp_path, BenchOptions())


def test_it_makes_its_own_artifacts(unet_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", unet_folder, "random:lora:1", "--forms", "--backend", "torch"]) == 2
    assert "--forms makes its own" in capsys.readouterr().err
