"""The comparison in examples/fit: its scripts on a fine-tune of two steps, and the record that lies beside them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trexport.fit.plan import FitPlan, open_tuned, plan_fit
from trexport.models.base import open_base
from trlora.fit import FitOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "fit"
RESULTS: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of examples/fit, and with them those of examples/digits, as scripts import them."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(FOLDER), str(EXAMPLES / "digits")]
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("tune", "simulate")})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(EXAMPLES):
                del sys.modules[name]


@pytest.fixture(scope="module")
def plan(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> FitPlan:
    folder = tmp_path_factory.mktemp("tuned") / "unet"
    unet, losses = scripts.tune.fine_tune(steps=2)
    assert len(losses) == 2
    unet.save_pretrained(folder)
    base = open_base("sample:digits")
    return plan_fit(base, open_tuned(str(folder), base), [r"mid_block\..*attn2\.to_[kv]"])


def test_the_comparison_runs_and_draws(
    scripts: SimpleNamespace, plan: FitPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.simulate, "LARGEST_SHARE", 0.2)
    budgets, options = (250, 500), FitOptions(starts=1, trial=5, sweeps=5)
    methods = scripts.simulate.simulate(plan, budgets, options)
    assert tuple(methods) == tuple(scripts.simulate.METHODS)
    for method in methods.values():
        for budget, point in zip(budgets, method["points"], strict=True):
            assert 0 < point["parameters"] <= budget
            assert 0 < point["error"] < 1
        assert method["points"][1]["error"] < method["points"][0]["error"]
    results = scripts.simulate.record(plan, methods, options)
    scripts.simulate.draw(results, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(results)


def test_lora_in_the_comparison_is_the_best_that_singular_values_allow(scripts: SimpleNamespace, plan: FitPlan) -> None:
    """Both layers are 32 → 48 wide, so a rank costs 80 parameters in either: the greatest values of both count."""
    assert {layer.shape for layer in plan.layers} == {(48, 32)}
    (point,) = scripts.simulate.simulate(plan, (400,), FitOptions(), ("LoRA",))["LoRA"]["points"]
    changes = [(tuned - base).double().numpy() for base, tuned in (layer.pair.weights() for layer in plan.layers)]
    values = np.sort(np.concatenate([np.linalg.svd(change, compute_uv=False) for change in changes]))[::-1]
    assert point["parameters"] == 400
    assert point["error"] == pytest.approx(np.sqrt((values[5:] ** 2).sum() / (values**2).sum()), rel=1e-4)


def test_the_record_is_what_the_readme_says(scripts: SimpleNamespace) -> None:
    assert tuple(RESULTS["methods"]) == tuple(scripts.simulate.METHODS)
    rows = re.findall(r"^\| ([A-Z].*?) \| (.*) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(RESULTS["methods"])
    for name, cells in rows:
        points = RESULTS["methods"][name]["points"]
        assert [cell.strip("* ") for cell in cells.split("|")] == [f"{point['error']:.3f}" for point in points]
        assert all(point["parameters"] <= point["budget"] for point in points)
        errors = [point["error"] for point in points]
        assert errors == sorted(errors, reverse=True)
