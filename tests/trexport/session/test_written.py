"""A factored artifact whose weights are written, as on a GPU, draws as with its cores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers import bits, trained
from tests.trexport.helpers import SIZES, damaged, drawn_by_torch
from trexport.artifact import Artifact, open_artifact
from trexport.backends import BACKENDS, OnnxFile
from trexport.bench.forms import cost_of, file_for
from trexport.bench.report import BackendResult
from trexport.bench.stats import Latency
from trexport.errors import UsageError
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.metrics import relative_l2
from trexport.parity.validate import ValidateOptions, validate
from trexport.session import Session, forms
from trexport.session.forms import FactoredForm, form_of
from trexport.session.replaced import WrittenForm
from trlora import Adapter, AdapterSpec, LayerAdapter, LayerParts, save_adapter

ADAPTERS = {"a": "random:tlora:2:6", "b": "random:lora:3", "c": "random:tlora:1:4"}
"""Of the two slots a and c fit the first only, b the second only."""


@pytest.fixture(autouse=True)
def writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "WRITING", ("cpu", "cuda"))


@pytest.fixture
def session(two_slots: Artifact) -> Iterator[Session]:
    with Session(two_slots) as opened:
        for name, argument in ADAPTERS.items():
            opened.load_adapter(name, argument)
        yield opened


def test_it_draws_as_torch_does(session: Session, base: Base) -> None:
    assert isinstance(form_of(session.artifact, "cpu"), WrittenForm)
    feeds = random_feeds(session.spec, SIZES, seed=4)
    plain = session.run(feeds)["out_sample"]
    assert relative_l2(plain, drawn_by_torch(base, [], feeds)) <= 1e-5
    session.activate({"a": 0.7})
    alone = session.run(feeds)["out_sample"]
    assert relative_l2(alone, drawn_by_torch(base, ["random:tlora:2:6=0.7"], feeds)) <= 1e-5
    session.activate({"c": 0.5, "b": 0.9})
    expected = drawn_by_torch(base, ["random:lora:3=0.9", "random:tlora:1:4=0.5"], feeds)
    assert relative_l2(session.run(feeds)["out_sample"], expected) <= 1e-5
    session.activate({"a": 0.7})
    assert bits(session.run(feeds)["out_sample"]) == bits(alone)
    session.deactivate()
    assert bits(session.run(feeds)["out_sample"]) == bits(plain)
    assert relative_l2(alone, plain) > 1e-3


def test_no_more_than_the_slots_take(session: Session) -> None:
    session.activate({"b": 1.0})
    with pytest.raises(UsageError, match="takes 2"):
        session.activate({"a": 1.0, "b": 1.0, "c": 1.0})
    with pytest.raises(UsageError, match="do not fit into this graph's slots together"):
        session.activate({"a": 1.0, "c": 1.0})
    assert session.active == {"b": 1.0}


def test_the_graph_has_the_weights_as_inputs_and_no_cores(two_slots: Artifact) -> None:
    form = form_of(two_slots, "cpu")
    assert form is not None
    assert form.graph is not None
    graph = onnx.load_from_string(form.graph)
    assert not graph.functions
    own = {value.name for value in graph.graph.input} - {tensor.name for tensor in two_slots.manifest.io.inputs}
    assert own == form.buffers.keys()
    assert all(name.endswith(".weight") for name in own)
    original = {t.name: t for t in onnx.load(two_slots.onnx_path, load_external_data=False).graph.initializer}
    for tensor in graph.graph.initializer:
        assert tensor.SerializeToString(deterministic=True) == original[tensor.name].SerializeToString(
            deterministic=True
        )


def test_the_benchmark_measures_what_a_session_runs(two_slots: Artifact, base: Base) -> None:
    adapters = open_adapters(["random:tlora:2:6=0.7"], base)
    file = file_for(two_slots, adapters, "cpu")
    assert isinstance(file, OnnxFile)
    feeds = random_feeds(file.spec, SIZES, seed=4)
    expected = drawn_by_torch(base, ["random:tlora:2:6=0.7"], feeds)
    with BACKENDS["onnxruntime"].load(file, "cpu") as runner:
        assert relative_l2(runner(feeds)["out_sample"], expected) <= 1e-5
    result = BackendResult("onnxruntime", Latency.of([1.0]), 1.0, 1.0, 1.0, 1, 0.0, None)
    cost = cost_of(two_slots, adapters, "cpu", result)
    assert cost.form == "factored"
    assert "layers" in str(cost.swapped_by)


def test_validate_checks_what_a_session_runs_too(
    two_slots: Artifact, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0, sizes=SIZES)
    adapters = open_adapters(["random:tlora:2:6=0.7", "random:lora:3"], base)
    report = validate(two_slots, base, adapters, "cpu", options)
    assert report.passed
    assert [step.who for step in report.steps] == ["", "in a session"]
    write = WrittenForm.write
    monkeypatch.setattr(WrittenForm, "write", lambda form, active: write(form, active[:1]))
    report = validate(two_slots, base, adapters, "cpu", options)
    assert not report.passed
    assert all(failure.startswith("in a session: ") for failure in report.failures)
    monkeypatch.setattr(forms, "WRITING", ("cuda",))
    assert [step.who for step in validate(two_slots, base, adapters, "cpu", options).steps] == [""]


@pytest.fixture
def holding(base: Base, tmp_path: Path) -> Artifact:
    """Factored, with an adapter in it."""
    options = ExportOptions(factored=FactoredOptions(), fixed=SIZES)
    export_onnx(base, open_adapters(["random:lora:3=0.9"], base), tmp_path / "held", options)
    return open_artifact(tmp_path / "held")


def test_a_wrong_weight_is_found_at_its_layer(holding: Artifact, tmp_path: Path) -> None:
    wrong = damaged(holding, tmp_path / "x", "down_blocks.0.resnets.0.norm2.weight", 0.5)
    options = ValidateOptions(timesteps=(10,), seeds=(0,), trajectory_steps=0, sizes=SIZES)
    report = validate(wrong, *wrong.sources(), "cpu", options)
    assert {failure.startswith("in a session") for failure in report.failures} == {True, False}
    assert report.first_deviation is not None
    assert report.first_deviation.module == "down_blocks.0.resnets.0.norm2"


def test_beside_another_artifact_it_draws_with_its_own_adapters(holding: Artifact, base: Base) -> None:
    own, others = open_adapters(["random:lora:3=0.9"], base), open_adapters(["random:lora:3=0.4"], base)
    for adapters, graph in ((own, True), (others, False)):
        file = file_for(holding, adapters, "cpu")
        assert isinstance(file, OnnxFile)
        assert (file.graph is not None) == graph
        feeds = random_feeds(file.spec, SIZES, seed=4)
        with BACKENDS["onnxruntime"].load(file, "cpu") as runner:
            assert relative_l2(runner(feeds)["out_sample"], drawn_by_torch(base, ["random:lora:3=0.9"], feeds)) <= 1e-5
            assert ("weights are fed" in str(runner.step(feeds).note)) == graph


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("conv_out", {"residual": {"type": "low_rank", "rank": 1}}),
        ("mid_block.attentions.0.proj_in", {"residual": {"type": "low_rank", "rank": 1}}),
        ("time_embedding.linear_1", {"magnitude": {"type": "scale", "bias": True}}),
    ],
    ids=["convolution", "pointwise", "scaled bias"],
)
def test_what_changes_more_than_products_keeps_its_cores(
    path: str, spec: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    rows, *columns = base.weight_shapes()[path]
    layer = trained(LayerAdapter.from_spec(AdapterSpec.from_dict(spec), math.prod(columns), rows), 0).float()
    save_adapter(Adapter.of({path: LayerParts.of(layer)}), tmp_path / "adapter")
    options = ExportOptions(factored=FactoredOptions(), fixed=SIZES)
    export_onnx(base, open_adapters([str(tmp_path / "adapter")], base), tmp_path / "factored", options)
    assert isinstance(form_of(open_artifact(tmp_path / "factored"), "cpu"), FactoredForm)
