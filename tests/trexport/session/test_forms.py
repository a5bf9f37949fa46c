"""Artifacts that hold their adapters, and those that take none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import bits
from tests.trexport.helpers import SIZES, drawn_by_torch
from trexport.artifact import Artifact
from trexport.errors import ArtifactError, UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.session import Session


def test_a_session_starts_as_the_base_where_the_graph_holds_an_adapter(base: Base, tmp_path: Path) -> None:
    options = ExportOptions(factored=FactoredOptions(), fixed=SIZES)
    export_onnx(base, open_adapters(["random:lora:3=0.9"], base), tmp_path / "held", options)
    with Session(tmp_path / "held") as session:
        feeds = random_feeds(session.spec, SIZES, seed=4)
        assert relative_l2(session.run(feeds)["out_sample"], drawn_by_torch(base, [], feeds)) <= 1e-5
        session.load_adapter("b", "random:lora:3")
        expected = drawn_by_torch(base, ["random:lora:3=0.9"], feeds)
        session.activate({"b": 0.9})
        assert relative_l2(session.run(feeds)["out_sample"], expected) <= 1e-5


def test_a_merged_artifact_takes_no_adapters(half_artifact: Artifact) -> None:
    with Session(half_artifact.folder) as session:
        feeds = random_feeds(session.spec, half_artifact.manifest.io.fixed_sizes(), seed=4)
        first = session.run(feeds)["out_sample"]
        assert first.dtype == torch.float16
        with pytest.raises(ArtifactError, match="takes no adapters"):
            session.load_adapter("a", "random:tlora:2:6")
        with pytest.raises(UsageError, match="'a'"):
            session.activate({"a": 1.0})
        session.deactivate()
        session.activate({})
        assert session.active == {}
        assert bits(session.run(feeds)["out_sample"]) == bits(first)
