"""The demo, on one adapter of the shipped sample: what it writes is whole and stands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import nn

from trexport.artifact import open_artifact
from trexport.demo.run import REPORT_NAME, run_demo
from trexport.errors import UsageError


@pytest.mark.slow
def test_the_whole_line_ends_in_a_report_that_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but Inductor, which takes a minute here and is in `backends/test_backends.py`: its graph runs uncompiled."""
    compiled = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compiled(self, fullgraph=True, backend="aot_eager")
    )
    said: list[str] = []
    result = run_demo(tmp_path / "out", ["outline"], say=said.append)
    assert result.passed
    assert set(result.parity) == {f"outline, {kind}" for kind in ("merged", "onnx", "factored", "bank", "swappable")}
    assert all(max(step.effect for step in report.steps) > 0.1 for report in result.parity.values())
    assert [entry.backend for entry in result.bench.results] == [
        "torch",
        "torch-compile",
        *(f"onnxruntime, {form}" for form in ("merged", "factored", "bank", "swappable")),
    ]
    assert [cost.form for cost in result.forms.costs] == ["merged", "factored", "bank of 1", "swappable"]
    assert said
    html = (tmp_path / "out" / REPORT_NAME).read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href)='([^']+)'", html)
    assert len(sources) == 8  # four rows of pictures, three of the forms with many adapters, and the plot
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    base, attached, merged, onnx = sources[:4]
    assert attached == merged == onnx  # the same pixels
    assert attached != base
    factored, none, mixed = sources[4:7]
    assert factored == attached
    assert none == base
    assert mixed not in (factored, none)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["parity"]["outline, onnx"]["passed"]
    for kind in ("merged", "onnx"):
        open_artifact(tmp_path / "out" / "outline" / kind)


def test_an_unknown_adapter_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="outline"):
        run_demo(tmp_path / "out", ["outlin"])
    assert list(tmp_path.iterdir()) == []
