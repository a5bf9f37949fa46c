"""The demo, on one adapter of the shipped sample: what it writes is whole and stands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trexport.artifact import open_artifact
from trexport.demo.run import REPORT_NAME, run_demo
from trexport.errors import UsageError


def test_the_whole_line_ends_in_a_report_that_stands_alone(tmp_path: Path) -> None:
    said: list[str] = []
    result = run_demo(tmp_path / "out", ["outline"], say=said.append)
    assert result.passed
    assert set(result.parity) == {"outline, merged", "outline, onnx"}
    assert all(max(step.effect for step in report.steps) > 0.1 for report in result.parity.values())
    assert [entry.backend for entry in result.bench.results] == ["torch", "torch-compile", "onnxruntime"]
    assert said
    html = (tmp_path / "out" / REPORT_NAME).read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href)='([^']+)'", html)
    assert len(sources) == 5  # four rows of pictures and the plot
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    base, attached, merged, onnx = sources[:4]
    assert attached == merged == onnx  # the same pixels
    assert attached != base
    assert json.loads((tmp_path / "out" / "report.json").read_text())["parity"]["outline, onnx"]["passed"]
    for kind in ("merged", "onnx"):
        open_artifact(tmp_path / "out" / "outline" / kind)


def test_an_unknown_adapter_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="outline"):
        run_demo(tmp_path / "out", ["outlin"])
    assert list(tmp_path.iterdir()) == []
