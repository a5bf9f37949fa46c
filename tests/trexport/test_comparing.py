from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import trained
from tests.trexport.helpers import run_cli
from trexport.comparing import compare
from trlora import Adapter, AdapterSpec, LayerAdapter, LayerParts, save_adapter

RING = {"type": "tensor_ring", "rank": 2}
LORA = {"residual": {"type": "low_rank", "rank": 3, "alpha": 2.0}}


def adapter_of(folder: Path, layers: dict[str, dict[str, Any]], seed: int, rows: int = 12) -> dict[str, LayerAdapter]:
    made = {
        path: trained(LayerAdapter.from_spec(AdapterSpec.from_dict(spec), 20, rows), seed).float()
        for path, spec in layers.items()
    }
    save_adapter(Adapter.of({path: LayerParts.of(layer) for path, layer in made.items()}), folder)
    return made


def test_distances_are_those_of_the_dense_matrices(tmp_path: Path) -> None:
    both = {"transform": RING, "residual": RING}
    a = adapter_of(tmp_path / "a", {"x": both, "y": LORA}, 1)
    b = adapter_of(tmp_path / "b", {"x": both, "z": LORA}, 2)
    found = compare(f"{tmp_path / 'a'}=0.5", str(tmp_path / "b"))
    assert found.facts["strength"] == [0.5, 1.0]
    assert (found.facts["layers_of_both"], found.facts["same"]) == (1, False)
    rows = {row[0]: row[1:] for row in found.rows}
    assert (rows["y"][0], rows["z"][0]) == ("the first only", "the second only")
    one, other = 0.5 * a["x"].residual.delta().flatten(), b["x"].residual.delta().flatten()
    assert rows["x"][0] == "both"
    assert float(rows["x"][1]) == pytest.approx(torch.cosine_similarity(one, other, dim=0).item(), abs=1e-3)
    assert float(rows["x"][2]) == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-2)
    first, second = a["x"].transform.matrix(), b["x"].transform.matrix()
    expected = (first - second).norm() / (first - torch.eye(20)).norm()
    assert float(rows["x"][3]) == pytest.approx(expected.item(), rel=1e-2)


def test_an_adapter_is_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_of(tmp_path / "a", {"x": LORA}, 1)
    assert run_cli(["inspect", tmp_path / "a", tmp_path / "a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"]
    assert (found["table"][0]["cosine of Δ"], found["table"][0]["distance of Δ"]) == ("1.000", "0.000")
    assert run_cli(["inspect", tmp_path / "a", tmp_path / "nowhere"]) in (1, 2)
    assert run_cli(["inspect", tmp_path / "a"]) == 0
    assert "carried" in capsys.readouterr().out


def test_layers_of_other_shapes_are_told(tmp_path: Path) -> None:
    adapter_of(tmp_path / "a", {"x": LORA}, 1)
    adapter_of(tmp_path / "b", {"x": LORA}, 1, rows=10)
    assert compare(str(tmp_path / "a"), str(tmp_path / "b")).rows[0][1] == "both, of other shapes"
