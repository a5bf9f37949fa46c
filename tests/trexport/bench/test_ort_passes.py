"""The benchmark of the graph passes runs, at the size of the test UNet."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks import ort_passes
from trexport.graph.ort_graph import PASSES
from trexport.models.base import Base


def test_rows_on_cuda() -> None:
    """Every pass on top of those before it, in one row of its own or with the one that it is nothing without."""
    without, found = [], []
    for row in ort_passes.rows("cuda"):
        if not row.provider:
            (without if row.label.startswith("all but") else found).append(row)
    assert [set(PASSES) - set(row.passes) for row in without] == [
        {row.label.removeprefix("all but ")} for row in without
    ]
    assert found[0].passes == ()
    assert found[-1].passes == tuple(PASSES)
    assert all(set(one.passes) < set(other.passes) for one, other in itertools.pairwise(found))
    assert len(found) == len(PASSES)


def test_rows_that_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_ONLY", "exported,search")
    assert [row.label for row in ort_passes.rows("cuda")] == [
        "as exported",
        "as exported, biases fused",
        "all, search for convolutions",
    ]


def test_it_runs_on_the_cpu(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_PROFILE", "1")
    fields = ort_passes.run(base, tmp_path, "cpu", "fp32")
    assert [row["label"] for row in fields["rows"]] == ["as exported", *(f"+ {name}" for name in ort_passes.ON_CPU)]
    assert all(row["latency"]["median_ms"] > 0 and row["relative_l2"] <= 1e-5 for row in fields["rows"])
    assert fields["rows"][-1]["replaced"] == {"neutral": 17, "multi_head_attention": 8, "skip_layer_norm": 8}
    assert fields["left"]["MultiHeadAttention"] == fields["profile"]["MultiHeadAttention"]["nodes"] == 8
